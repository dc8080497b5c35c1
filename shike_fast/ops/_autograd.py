"""Kernels that PyTorch cannot see into as operators with a derivative: one record each, one pair of autograd functions.

Eager calls on plain tensors go to the kernels directly: the dispatcher's way through Python costs as much as a small
loss. Whoever must see an operation (tracers, dispatch modes, functorch, subclasses) sees the operators.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast.ops._dispatch import LIBRARY
from shike_fast.ops._guards import forbid_tangents, is_plain, is_transformed


class Fused:
    """A forward kernel and its backward kernel.

    The tensors come in groups: a tensor, None, or a list of them. The first groups are differentiable and lists. The
    forward returns the differentiable result, then what else the caller sees, then what only the backward needs.

    Args:
        name: the operator's name, without the namespace.
        forward: (*groups, *options) -> results.
        backward: (grad_output, *groups, *saved, *options) -> what ``gradients`` takes.
        gradients: (what the backward returned, dimensions of the first tensor) -> a gradient for every differentiable
            tensor; those of tensors that need none are dropped.
        differentiable: the number of differentiable groups.
        shown: the number of results beside the first that the caller sees.
        both: what ``forward`` returns without the part for the backward, and what ``backward`` returns for a
            ``grad_output`` of 1; or what ``forward`` returns, and what ``backward`` takes as ``kept`` to complete it.
            None where it cannot. It is used where a gradient is wanted and no tracer is at work.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., Any],
        gradients: Callable[[Any, int], Sequence[Tensor | None]] = lambda gradients, _: gradients,
        differentiable: int = 1,
        shown: int = 0,
        both: Callable[..., tuple[tuple[Tensor, ...], Any] | None] | None = None,
    ) -> None:
        self.name, self.forward, self.backward, self.gradients = name, forward, backward, gradients
        self.differentiable, self.shown, self.both = differentiable, shown, both
        self.op: Callable[..., Any] | None = None  # None: called directly only
        self.backward_op: Callable[..., Any] | None = None

    def register(
        self,
        tensors: str,
        options: str,
        saved: str,
        *,
        results: str,
        gradients: str,
        fake_forward: Callable[..., Any],
        fake_backward: Callable[..., Any],
    ) -> "Fused":
        """Make the kernels operators of the dispatcher.

            shike_fast::<name>(<tensors>, <options>) -> <results>
            shike_fast::<name>_backward(Tensor grad_output, <tensors>, <saved>, <options>) -> <gradients>

        The fakes do the same on tensors without data: shapes, dtypes and strides.
        """
        groups = tensors.count(",") + 1

        def with_autograd(*args: Any) -> Any:
            flat, lengths = _flat(args[:groups])
            forbid_tangents(self.name, *flat)
            if self._needs_gradient(args[:groups]):
                call = _Call(self, args[groups:], lengths, flat[0].dim(), len(flat))
                return _Function.apply(call, None, *flat)
            return _below_autograd(self.op, *args)

        def without_derivative(*args: Any) -> Any:
            forbid_tangents(self.name, *args)
            return _below_autograd(self.backward_op, *args)

        self.op = _define(f"{self.name}({tensors}, {options}) -> {results}", self.forward, fake_forward, with_autograd)
        self.backward_op = _define(
            f"{self.name}_backward(Tensor grad_output, {tensors}, {saved}, {options}) -> {gradients}",
            self.backward,
            fake_backward,
            without_derivative,
        )
        return self

    def direct(self, groups: Sequence[Any], options: Sequence[Any], extra: Sequence[Any] = ()) -> Sequence[Tensor]:
        """The results for plain tensors, past the dispatcher, perhaps without those that only the backward needs.

        ``extra`` are more arguments of ``forward``.
        """
        if not self._needs_gradient(groups):
            return self.forward(*groups, *options, *extra)
        flat, lengths = _flat(groups)
        # What is not differentiable need not pass through autograd: a microsecond a tensor.
        differentiable = flat[: sum(lengths[: self.differentiable])]  # type: ignore[arg-type]  # these are lists
        call = _Call(self, options, lengths, flat[0].dim(), len(flat))
        shown: list[Tensor] = []
        result = _apply(call, (groups, flat, extra, shown), *differentiable)
        return result, *shown

    def dispatched(self, groups: Sequence[Any], options: Sequence[Any]) -> Sequence[Tensor]:
        """The results for all others, by the operators."""
        assert self.op is not None
        results: Sequence[Tensor]
        if is_transformed():
            flat, lengths = _flat(groups)
            call = _Call(self, options, lengths, flat[0].dim(), len(flat))
            results = _TransformedFunction.apply(call, None, *flat)
        else:
            results = self.op(*groups, *options)
        return results

    def _needs_gradient(self, groups: Sequence[Any]) -> bool:
        if torch.is_grad_enabled():
            for group in groups[: self.differentiable]:
                for tensor in group:
                    if tensor is not None and tensor.requires_grad:
                        return True
        return False


class _Call(NamedTuple):
    """What is no tensor in a call, and how many tensors there are."""

    op: Fused
    options: Sequence[Any]
    lengths: list[int | None]  # of the groups that are lists
    dims: int  # of the first tensor
    total: int

    def groups(self, tensors: Sequence[Any]) -> list[Any]:
        """The tensors in their groups again."""
        groups, start = [], 0
        for length in self.lengths:
            if length is None:
                groups.append(tensors[start])
                start += 1
            else:
                groups.append([*tensors[start : start + length]])
                start += length
        return groups


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, direct: tuple[Any, ...] | None, *tensors: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        op = call.op
        if direct is None:
            results = _below_autograd(op.op, *call.groups(tensors), *call.options)
            _save(ctx, call, tensors, results)
            return results
        groups, flat, extra, shown = direct
        ctx.call, ctx.computed, ctx.kept = call, None, ()
        if op.both is not None and (both := op.both(*groups, *call.options)) is not None:
            results, ctx.computed = both
            ctx.save_for_backward(*flat, *results[1 + op.shown :])
        else:
            results = op.forward(*groups, *call.options, *extra)
            ctx.save_for_backward(*flat, *results[1 + op.shown :])
        shown += results[1 : 1 + op.shown]  # what has no gradient need not pass through autograd
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        op, needs = call.op, ctx.needs_input_grad[2:]
        if grad_output is None:
            return (None,) * (2 + len(needs))
        create_graph = torch.is_grad_enabled()
        if ctx.computed is not None and not create_graph and is_plain(grad_output):
            # Handed over once: a second backward computes it anew.
            computed, ctx.computed = ctx.computed, None
            if not isinstance(computed, Tensor):
                saved = ctx.saved_tensors
                groups, results = call.groups(saved[: call.total]), saved[call.total :]
                computed = op.backward(grad_output, *groups, *results, *call.options, kept=computed)
            elif grad_output.item() != 1.0:
                computed *= grad_output
        else:
            saved = ctx.saved_tensors
            tensors = saved[: call.total]
            groups, kept = call.groups(tensors), saved[call.total :] or ctx.kept
            forward, backward = op.forward, op.backward
            if op.backward_op is not None and not is_plain(grad_output, *saved):
                forward, backward = partial(_below_autograd, op.op), op.backward_op
            if not kept:  # by the first backward after `both`, for itself and further ones
                kept = ctx.kept = forward(*groups, *call.options)[1 + op.shown :]
            computed = backward(grad_output, *groups, *kept, *call.options)
        gradients = op.gradients(computed, call.dims)
        if False in needs:
            gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=False)]
        if create_graph:
            present = [t for t in tensors[: len(gradients)] if t is not None]
            gradients = [
                g if g is None else _SecondDerivative.apply(op.name, g, grad_output, *present) for g in gradients
            ]
        return None, None, *gradients, *[None] * (len(needs) - len(gradients))


# Past the part of ``apply`` in Python, two microseconds that look for what no plain tensor has.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Function).apply


class _TransformedFunction(_Function):
    """The same for ``torch.func``, which wants the context set apart from the forward; that costs time otherwise."""

    @staticmethod
    def forward(*args: Any) -> Any:
        call, _, *tensors = args
        groups = call.groups(tensors)
        if is_plain(*tensors):
            return call.op.forward(*groups, *call.options)
        return _below_autograd(call.op.op, *groups, *call.options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, _, *tensors = inputs
        _save(ctx, call, tensors, output)


class _SecondDerivative(torch.autograd.Function):
    """A gradient that is no constant, although its derivative is not known: asking for it must not give 0."""

    @staticmethod
    def forward(name: str, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(f"{ctx.name}: it can be differentiated once only; backend='reference' has no such limit")


def _save(ctx: Any, call: _Call, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
    ctx.call, ctx.computed, ctx.kept = call, None, ()
    ctx.save_for_backward(*tensors, *results[1 + call.op.shown :])
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)


def _below_autograd(op: Callable[..., Any] | None, *args: Any) -> Any:
    assert op is not None
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _flat(groups: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """All tensors, and the length of each group that is a list."""
    flat: list[Any] = []
    lengths: list[int | None] = []
    for group in groups:
        if group is None or isinstance(group, Tensor):
            flat.append(group)
            lengths.append(None)
        else:
            flat += group
            lengths.append(len(group))
    return flat, lengths


def _define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]
) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"shike_fast::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, autograd, "Autograd")
    return getattr(torch.ops.shike_fast, name).default
