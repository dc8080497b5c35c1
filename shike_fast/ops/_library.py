"""Registration with the PyTorch dispatcher, in the namespace ``shike_fast``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("shike_fast", "FRAGMENT")


def define_composite(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``function`` as ``shike_fast::<name>`` and return the op.

    The function is a composition of PyTorch operators, so autograd, ``torch.compile``, ``torch.export`` and
    ``torch.func`` see through it and it needs no derivative or shape rule of its own. ``Library.define`` and ``impl``
    cost a fraction of the time of a call through ``torch.library.custom_op``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.shike_fast, name).default


def define_fused_loss(
    name: str,
    arguments: str,
    options: str,
    results: int,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Tensor],
    fake_forward: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """Register a loss whose kernels PyTorch cannot see into, with its derivative; return the op.

        shike_fast::<name>(Tensor[] logits, <arguments>, <options>, str backend) -> (loss, ..., state)
        shike_fast::<name>_backward(Tensor incoming, Tensor[] logits, <arguments>, Tensor state, <options>, str backend)
            -> gradient of the logits

    The logits travel as one tensor [K, B, C] or as K tensors [B, C], so that neither kind is copied; only they are
    differentiable, and only the first result, the loss, passes gradients on.

    Args:
        name: the op's name, without the namespace.
        arguments: schema of the other tensors, ``"Tensor target, Tensor? bias"``.
        options: schema of the numbers and flags.
        results: how many tensors the forward returns; the last is the state that the backward takes.
        forward: (logits, *arguments, *options, backend) -> results.
        backward: (incoming, logits, *arguments, state, *options, backend) -> one tensor [K, B, C].
        fake_forward: as ``forward``, on tensors without data: shapes, dtypes and strides of the results.

    Returns:
        The op; call it with (logits, *arguments, *options, backend).
    """
    tensors = len(arguments.split(","))
    _LIBRARY.define(
        f"{name}(Tensor[] logits, {arguments}, {options}, str backend) -> ({', '.join(['Tensor'] * results)})",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.define(
        f"{name}_backward(Tensor incoming, Tensor[] logits, {arguments}, Tensor state, {options}, str backend)"
        " -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, forward, key)
        _LIBRARY.impl(f"{name}_backward", backward, key)
    torch.library.register_fake(f"shike_fast::{name}", fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"shike_fast::{name}_backward", _fake_gradient, lib=_LIBRARY)
    op = getattr(torch.ops.shike_fast, name).default
    backward_op = getattr(torch.ops.shike_fast, f"{name}_backward").default

    def below_autograd(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out: tuple[Tensor, ...] = op(*args)
        return out

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, others: tuple[Any, ...], *logits: Tensor) -> tuple[Tensor, ...]:
            out = below_autograd(logits, *others)
            ctx.save_for_backward(*logits, *others[:tensors], out[-1])
            ctx.options = others[tensors:]
            ctx.mark_non_differentiable(*out[1:])
            ctx.set_materialize_grads(False)
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, incoming: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            count = len(ctx.needs_input_grad) - 1
            if incoming is None:
                return (None,) * (count + 1)
            saved = ctx.saved_tensors
            gradient = backward_op(incoming, saved[:count], *saved[count:], *ctx.options)
            return None, *(gradient.unbind(0) if saved[0].dim() == 2 else (gradient,))

    def with_autograd(logits: Sequence[Tensor], *others: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(expert.requires_grad for expert in logits):
            out: tuple[Tensor, ...] = Loss.apply(others, *logits)
            return out
        return below_autograd(logits, *others)

    _LIBRARY.impl(name, with_autograd, "Autograd")
    _LIBRARY.impl(f"{name}_backward", torch.library.fallthrough_kernel, "Autograd")
    return op


def gradient_like(logits: Sequence[Tensor]) -> Tensor:
    """Uninitialised memory for the gradient [K, B, C]: laid out as one tensor of logits, contiguous for a sequence."""
    first = logits[0]
    return torch.empty_like(first) if first.dim() == 3 else first.new_empty((len(logits), *first.shape))


def _fake_gradient(incoming: Tensor, logits: Sequence[Tensor], *_: Any) -> Tensor:
    return gradient_like(logits)
