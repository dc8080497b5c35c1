"""Kernels that PyTorch cannot see into as operators with a derivative: one record each, one pair of autograd functions.

Eager calls on plain tensors go to the kernels directly: the dispatcher's way through Python costs as much as a small
loss. Whoever must see an operation (tracers, dispatch modes, functorch, subclasses) sees the operators.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
        both: as ``forward``, and what ``backward`` returns for a ``grad_output`` of 1; None where it cannot. It is used
            where a gradient is wanted and no tracer is at work.
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
            flat = _flat(args[:groups])
            forbid_tangents(self.name, *flat)
            if self._needs_gradient(args[:groups]):
                return _Function.apply(_Call(self, args[:groups], args[groups:]), None, *flat)
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

    def __call__(self, groups: Sequence[Any], options: Sequence[Any]) -> Sequence[Tensor]:
        """The results, perhaps without those that only the backward needs."""
        flat = _flat(groups)
        return self._direct(groups, flat, options, ()) if is_plain(*flat) else self.dispatched(groups, options)

    def direct(self, groups: Sequence[Any], options: Sequence[Any], extra: Sequence[Any] = ()) -> Sequence[Tensor]:
        """For plain tensors: past the dispatcher. ``extra`` are more arguments of ``forward``."""
        return self._direct(groups, _flat(groups), options, extra)

    def dispatched(self, groups: Sequence[Any], options: Sequence[Any]) -> Sequence[Tensor]:
        """For all others: as operators."""
        assert self.op is not None
        results: Sequence[Tensor] = (
            _TransformedFunction.apply(_Call(self, groups, options), None, *_flat(groups))
            if is_transformed()
            else self.op(*groups, *options)
        )
        return results

    def _direct(
        self, groups: Sequence[Any], flat: list[Any], options: Sequence[Any], extra: Sequence[Any]
    ) -> Sequence[Tensor]:
        if not self._needs_gradient(groups):
            return self.forward(*groups, *options, *extra)
        shown: list[Tensor] = []
        result = _Function.apply(_Call(self, groups, options), (groups, extra, shown), *flat)
        return result, *shown

    def _needs_gradient(self, groups: Sequence[Any]) -> bool:
        if torch.is_grad_enabled():
            for group in groups[: self.differentiable]:
                for tensor in group:
                    if tensor is not None and tensor.requires_grad:
                        return True
        return False


class _Call:
    """What is no tensor in a call, and how many tensors each group holds."""

    __slots__ = ("dims", "lengths", "op", "options")

    def __init__(self, op: Fused, groups: Sequence[Any], options: Sequence[Any]) -> None:
        self.op, self.options, self.dims = op, options, groups[0][0].dim()
        self.lengths = [None if group is None or isinstance(group, Tensor) else len(group) for group in groups]

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
        op, ctx.computed = call.op, None
        if direct is None:
            results = _below_autograd(op.op, *call.groups(tensors), *call.options)
            _save(ctx, call, tensors, results)
            ctx.mark_non_differentiable(*results[1:])
            return results
        groups, extra, shown = direct
        if op.both is not None and (both := op.both(*groups, *call.options)) is not None:
            results, ctx.computed = both
        else:
            results = op.forward(*groups, *call.options, *extra)
        _save(ctx, call, tensors, results)
        shown += results[1 : 1 + op.shown]  # what has no gradient need not pass through autograd
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[2:]
        op: Fused = call.op
        if grad_output is None:
            return (None,) * (2 + len(needs))
        create_graph = torch.is_grad_enabled()
        if ctx.computed is not None and not create_graph and is_plain(grad_output):
            # Given away: whoever asks a second time gets a gradient computed anew.
            computed, ctx.computed = ctx.computed, None
            if grad_output.item() != 1.0:
                computed *= grad_output
        else:
            saved = ctx.saved_tensors
            tensors = saved[: len(needs)]
            backward = op.backward if op.backward_op is None or is_plain(grad_output, *saved) else op.backward_op
            computed = backward(grad_output, *call.groups(tensors), *saved[len(needs) :], *call.options)
        gradients = [g if needed else None for g, needed in zip(op.gradients(computed, call.dims), needs, strict=False)]
        if create_graph:
            present = [t for t in tensors[: len(gradients)] if t is not None]
            gradients = [
                g if g is None else _SecondDerivative.apply(op.name, g, grad_output, *present) for g in gradients
            ]
        return None, None, *gradients, *[None] * (len(needs) - len(gradients))


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
        ctx.computed = None
        _save(ctx, call, tensors, output)
        ctx.mark_non_differentiable(*output[1:])


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
    ctx.call = call
    ctx.save_for_backward(*tensors, *results[1 + call.op.shown :])
    ctx.set_materialize_grads(False)


def _below_autograd(op: Callable[..., Any] | None, *args: Any) -> Any:
    assert op is not None
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _flat(groups: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for group in groups:
        if group is None or isinstance(group, Tensor):
            flat.append(group)
        else:
            flat += group
    return flat


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
