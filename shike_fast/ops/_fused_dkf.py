"""The fused kernels of depth-wise knowledge fusion as PyTorch operators, with their derivative.

    shike_fast::dkf_fused(maps, vectors, normalisers?, ...) -> (f, sums, normalisers, statistics)
    shike_fast::dkf_fused_backward(incoming, maps, vectors, sums, normalisers, ...) -> (gradients of maps, of vectors)

As with the losses, eager calls on plain tensors go to the kernels directly, and whoever must see an operation (tracers,
dispatch modes, functorch, subclasses) sees these operators. They change none of their inputs: running statistics are
then updated from the ``statistics``.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast.ops import _fused, _native_dkf
from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._dkf_arguments import BatchNormArguments, DkfArguments
from shike_fast.ops._library import (
    define_opaque,
    differentiable_once,
    forbid_tangents,
    is_plain,
    materialised,
    no_derivative,
)

_NAME = "dkf_fused"


class _Options(NamedTuple):
    """What is no tensor in a call."""

    experts: int
    norms: int
    folded: bool
    relu: list[bool]  # K
    eps: list[float]  # n
    backend: str
    running: list[Tensor]  # 2n, updated in place by the kernels; or none
    momentum: list[float]  # n

    def arguments(self, tensors: Sequence[Tensor | None]) -> DkfArguments:
        """The tensors, maps first, then weights and biases, in their places."""
        k, n, tensors = self.experts, self.norms, list(tensors)
        maps = 3 * k if self.folded else 2 * k
        return DkfArguments(
            tensors[:k],  # type: ignore[arg-type]
            tensors[k : 2 * k],  # type: ignore[arg-type]
            tensors[2 * k : maps],  # type: ignore[arg-type]
            tensors[maps : maps + n],
            tensors[maps + n :],
            self.relu,
        )


def kernels_of(backend: str) -> ModuleType:
    """The module with the backend's ``dkf_*`` functions."""
    return _fused.kernels("dkf", backend, _native_dkf)


# ---- the operators

_MAPS = "Tensor[] deep, Tensor[] shallow, Tensor[] shortcut, Tensor?[] weight, Tensor?[] bias"


def _forward(
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    normalisers: Tensor | None,
    eps: list[float],
    relu: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = DkfArguments(deep, shallow, shortcut, weight, bias, relu)
    f, sums, made, statistics = kernels_of(backend).dkf_forward(args, normalisers, eps, [], [0.0] * args.norms)
    return f, sums, args.new(0, 3, made.shape[2]) if normalisers is not None else made, statistics


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    deep, shallow, shortcut, weight, bias, normalisers, _eps, relu, _backend = args
    arguments = DkfArguments(deep, shallow, shortcut, weight, bias, relu)
    return arguments.new_results(training=normalisers is None)


def _backward(
    incoming: Tensor,
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    sums: Tensor,
    normalisers: Tensor,
    training: bool,
    relu: list[bool],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    args, kernels = DkfArguments(deep, shallow, shortcut, weight, bias, relu), kernels_of(backend)
    incoming = incoming.to(deep[0].dtype).contiguous()
    vectors = kernels.dkf_vector_gradients(args, incoming, sums)
    inverse_count = 1.0 / args.values if training else 0.0
    return kernels.dkf_map_gradients(args, incoming, normalisers, vectors, inverse_count), vectors


def _fake_backward(incoming: Tensor, *args: Any) -> tuple[list[Tensor], Tensor]:
    deep, shallow, shortcut, weight, bias, _sums, _normalisers, _training, relu, _backend = args
    arguments = DkfArguments(deep, shallow, shortcut, weight, bias, relu)
    return arguments.new_gradients(), arguments.new(arguments.norms, 2, incoming.shape[2])


# ---- the derivative


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: _Options, beside: list[Tensor] | None, normalisers: Tensor | None, *tensors: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        out = _run(options, beside is not None, normalisers, tensors)
        _keep(ctx, options, normalisers, tensors, out)
        if beside is not None:  # called directly: what is not differentiable need not pass through autograd
            beside.append(out[3])
            return out[0]
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        *tensors, sums, normalisers = ctx.saved_tensors
        if incoming is None:
            return (None,) * (3 + len(tensors))
        args = options.arguments(tensors)
        present = [tensor for tensor in tensors if tensor is not None]
        run = _backward if is_plain(incoming, *present, sums, normalisers) else _backward_op
        maps, vectors = run(incoming, *args[:-1], sums, normalisers, ctx.training, options.relu, options.backend)
        of_vectors = [*vectors.unbind(0)] if options.norms > 0 else []
        gradients = [
            *maps,
            *(None if w is None else pair[0] for w, pair in zip(args.weight, of_vectors, strict=True)),
            *(None if b is None else pair[1] for b, pair in zip(args.bias, of_vectors, strict=True)),
        ]
        if torch.is_grad_enabled():  # a graph of the backward is wanted
            gradients = [
                None if gradient is None else differentiable_once(_NAME, gradient, incoming, *present)
                for gradient in gradients
            ]
        return None, None, None, *gradients


class _TransformedFusion(_Fusion):
    """The same for torch.func, which wants the context set apart from the forward; that costs time otherwise."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        options, _, normalisers, *tensors = args
        return _run(options, is_plain(normalisers, *tensors), normalisers, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        options, _, normalisers, *tensors = inputs
        _keep(ctx, options, normalisers, tensors, output)
        ctx.mark_non_differentiable(*output[1:])


def _run(
    options: _Options, direct: bool, normalisers: Tensor | None, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """f, sums, normalisers that were made, statistics."""
    args = options.arguments(tensors)
    if direct:
        f, sums, kept, statistics = kernels_of(options.backend).dkf_forward(
            args, normalisers, options.eps, options.running, options.momentum
        )
        return f, sums, kept if normalisers is None else sums.new_empty(0), statistics
    with torch._C._AutoDispatchBelowAutograd():
        out: tuple[Tensor, ...] = _op(*args[:-1], normalisers, options.eps, options.relu, options.backend)
    return out


def _keep(
    ctx: Any,
    options: _Options,
    normalisers: Tensor | None,
    tensors: Sequence[Tensor | None],
    out: Sequence[Tensor],
) -> None:
    ctx.options, ctx.training = options, normalisers is None
    ctx.save_for_backward(*tensors, out[1], out[2] if normalisers is None else normalisers)
    ctx.set_materialize_grads(False)


def _with_autograd(
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    normalisers: Tensor | None,
    eps: list[float],
    relu: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    tensors = [*deep, *shallow, *shortcut, *weight, *bias]
    forbid_tangents(_NAME, normalisers, *tensors)
    options = _Options(len(deep), len(weight), len(shortcut) > 0, relu, eps, backend, [], [0.0] * len(weight))
    if not _needs_gradient(tensors):
        return _run(options, False, normalisers, tensors)
    out: tuple[Tensor, ...] = _Fusion.apply(options, None, normalisers, *tensors)
    return out


_op = define_opaque(
    f"{_NAME}({_MAPS}, Tensor? normalisers, float[] eps, bool[] relu, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _with_autograd,
)
_backward_op = define_opaque(
    f"{_NAME}_backward(Tensor incoming, {_MAPS}, Tensor sums, Tensor normalisers, bool training, bool[] relu, "
    "str backend) -> (Tensor[], Tensor)",
    _backward,
    _fake_backward,
    no_derivative(_NAME, lambda *args: getattr(torch.ops.shike_fast, f"{_NAME}_backward").default(*args)),
)


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ---- what the public functions call


def fuse(
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],  # none, K or 2K: those of the shallow maps, then those of the deep ones
    relu: list[bool],
    backend: str,
) -> Tensor:
    """f [K, B, C] of K experts; all norms train, or none does."""
    dtype = accumulation_dtype(deep[0].dtype)
    training = len(norms) > 0 and norms[0].training
    tensors = [*deep, *shallow, *shortcut, *vectors_of(norms, dtype)]
    kept = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None] if training else []
    if training:
        normalisers = None
    elif norms:
        normalisers = running_normalisers(norms, dtype)
    else:
        normalisers = deep[0].new_empty((0, 3, deep[0].shape[1]), dtype=dtype)
    plain = is_plain(normalisers, *tensors, *kept)
    # The kernels update running statistics that look as they need them and that no two normalisations share.
    in_kernel = plain and len(kept) == 2 * len(norms) and all(_fits(t, dtype) for t in kept)
    in_kernel = in_kernel and len({t.data_ptr() for t in kept}) == len(kept)
    options = _Options(
        len(deep),
        len(norms),
        len(shortcut) > 0,
        relu,
        [norm.eps for norm in norms],
        backend,
        kept if in_kernel else [],
        [norm.momentum for norm in norms],
    )
    if plain:
        if _needs_gradient(tensors):
            beside: list[Tensor] = []
            f, statistics = _Fusion.apply(options, beside, normalisers, *tensors), *beside
        else:
            f, _, _, statistics = _run(options, True, normalisers, tensors)
    elif torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        f, _, _, statistics = _TransformedFusion.apply(options, None, normalisers, *tensors)
    else:
        args = options.arguments(tensors)
        f, _, _, statistics = _op(*args[:-1], normalisers, options.eps, relu, backend)
    if kept and not in_kernel:
        update_running(norms, statistics)
    for tensor in options.running:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    result: Tensor = f
    return result


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()


def vectors_of(norms: Sequence[BatchNormArguments], dtype: torch.dtype) -> list[Tensor | None]:
    """Weights, then biases, as the kernels take them; differentiable."""
    return [
        None if vector is None else materialised(vector.to(dtype)).contiguous()
        for vector in (*(norm.weight for norm in norms), *(norm.bias for norm in norms))
    ]


def running_normalisers(norms: Sequence[BatchNormArguments], dtype: torch.dtype) -> Tensor:
    """[n, 3, C] from running statistics: the mean, no rest, 1 / sqrt(var + eps)."""
    rows = []
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        mean = norm.running_mean.to(dtype)
        rows += [mean, torch.zeros_like(mean), (norm.running_var.to(dtype) + norm.eps).rsqrt()]
    return torch.stack(rows).unflatten(0, (len(norms), 3)).detach()


def update_running(norms: Sequence[BatchNormArguments], statistics: Tensor) -> None:
    """Blend mean and unbiased variance [n, 2, C] into the running statistics, in float64 and rounded once."""
    with torch.no_grad():
        for norm, (mean, unbiased) in zip(norms, statistics.double().unbind(0), strict=True):
            for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                if running is not None:
                    running.copy_(norm.momentum * new + (1 - norm.momentum) * running)
