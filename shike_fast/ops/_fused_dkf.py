"""The fused kernels of depth-wise knowledge fusion.

The operators change none of their inputs: running statistics are updated from the ``statistics`` that they return.
Called directly, the kernels update them on the way.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops import _dispatch, _native_dkf
from shike_fast.ops._autograd import Fused
from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._dkf_arguments import BatchNormArguments, DkfArguments
from shike_fast.ops._guards import is_plain, materialised


def kernels_of(backend: str) -> ModuleType:
    """The module with the backend's ``dkf_*`` functions."""
    return _dispatch.kernels("dkf", backend, _native_dkf)


def _forward(
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    mean_rstd: Tensor | None,  # [n, 3, C]: mean, what its rounding left, 1/σ; None: training
    eps: list[float],
    relu: list[bool],
    backend: str,
    running: Sequence[Tensor] = (),  # 2n: mean and variance of each norm, updated in place; or none
    momentum: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [K, B, C], statistics for the running ones [n, 2, C], sums for the backward [K, S, B, C], mean_rstd if new."""
    args = DkfArguments(deep, shallow, shortcut, weight, bias, relu)
    f, sums, new_mean_rstd, statistics = kernels_of(backend).dkf_forward(
        args, mean_rstd, eps, running, momentum or [0.0] * args.norms
    )
    return f, statistics, sums, new_mean_rstd if mean_rstd is None else args.new(0, 3, new_mean_rstd.shape[2])


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, mean_rstd, _eps, relu, _backend = args
    f, sums, new_mean_rstd, statistics = DkfArguments._make((*tensors, relu)).new_results(training=mean_rstd is None)
    return f, statistics, sums, new_mean_rstd


def _backward(grad_output: Tensor, *args: Any) -> tuple[list[Tensor], Tensor]:
    """Gradients of the maps, and of weights and biases [n, 2, C]."""
    *tensors, mean_rstd, sums, new_mean_rstd, _eps, relu, backend = args
    arguments, kernels = DkfArguments._make((*tensors, relu)), kernels_of(backend)
    grad_output = grad_output.to(arguments.deep[0].dtype).contiguous()
    vectors = kernels.dkf_vector_gradients(arguments, grad_output, sums)
    used, inverse_count = (new_mean_rstd, 1.0 / arguments.values) if mean_rstd is None else (mean_rstd, 0.0)
    return kernels.dkf_map_gradients(arguments, grad_output, used, vectors, inverse_count), vectors


def _fake_backward(grad_output: Tensor, *args: Any) -> tuple[list[Tensor], Tensor]:
    *tensors, _mean_rstd, _sums, _new_mean_rstd, _eps, relu, _backend = args
    arguments = DkfArguments._make((*tensors, relu))
    return arguments.new_gradients(), arguments.new(arguments.norms, 2, grad_output.shape[2])


def gradients_of_maps_and_vectors(computed: tuple[list[Tensor], Tensor], _dims: int) -> list[Tensor]:
    """One list: maps, weights, biases."""
    maps, vectors = computed
    return [*maps, *vectors[:, 0].unbind(0), *vectors[:, 1].unbind(0)]


FUSED = Fused(
    "dkf_fused",
    forward=_forward,
    backward=_backward,
    gradients=gradients_of_maps_and_vectors,
    differentiable=5,
    shown=1,
).register(
    "Tensor[] deep, Tensor[] shallow, Tensor[] shortcut, Tensor?[] weight, Tensor?[] bias, Tensor? mean_rstd",
    "float[] eps, bool[] relu, str backend",
    "Tensor sums, Tensor new_mean_rstd",
    results="(Tensor, Tensor, Tensor, Tensor)",
    gradients="(Tensor[], Tensor)",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
)


def fuse(
    backend: str,
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],  # none, K or 2K: those of the shallow maps, then those of the deep ones
    relu: list[bool],
) -> Tensor:
    """f [K, B, C] of K experts; all norms train, or none does."""
    dtype = accumulation_dtype(deep[0].dtype)
    training = len(norms) > 0 and norms[0].training
    vectors = vectors_of(norms, dtype)
    if training:
        mean_rstd, kept = None, [t for norm in norms for t in norm[2:4] if t is not None]
    else:
        mean_rstd, kept = _running_mean_rstd(norms, dtype, deep[0]), []
    groups = deep, shallow, shortcut, vectors[: len(norms)], vectors[len(norms) :], mean_rstd
    options = [norm.eps for norm in norms], relu, backend
    if is_plain(*deep, *shallow, *shortcut, *vectors, mean_rstd, *kept):
        # The kernels update running statistics that look as they need them and that no two normalisations share.
        in_kernel = len(kept) == 2 * len(norms) and all(t.dtype == dtype and t.is_contiguous() for t in kept)
        in_kernel = in_kernel and len({t.data_ptr() for t in kept}) == len(kept)
        running = kept if in_kernel else []
        f, statistics = FUSED.direct(groups, options, (running, [norm.momentum for norm in norms]))[:2]
    else:
        running = []
        f, statistics = FUSED.dispatched(groups, options)[:2]
    if kept and not running:
        update_running(norms, statistics)
    for tensor in running:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    return f


def vectors_of(norms: Sequence[BatchNormArguments], dtype: torch.dtype) -> list[Tensor | None]:
    """Weights, then biases, as the kernels take them; differentiable."""
    return [
        None if vector is None else materialised(vector.to(dtype)).contiguous()
        for vector in (*(norm.weight for norm in norms), *(norm.bias for norm in norms))
    ]


def _running_mean_rstd(norms: Sequence[BatchNormArguments], dtype: torch.dtype, map_: Tensor) -> Tensor:
    """[n, 3, C] from running statistics: the mean, no rest, 1 / sqrt(var + eps)."""
    if not norms:
        return map_.new_empty((0, 3, map_.shape[1]), dtype=dtype)
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
