"""What the losses share: their records, and their kernels as operators."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from shike_fast.ops._autograd import Fused
from shike_fast.ops._checks import gradient_like, stacked
from shike_fast.ops._dispatch import MAX_EXPERTS, Operator, refuses_tensor

MAX_CLASSES = 2**24 - 1  # the kernels keep class numbers, and 2²⁴ for none, in float32


def loss_operator(
    name: str,
    schema: str,
    composite: Callable[..., Any],
    *,
    fused: Callable[..., Any] | None = None,
    refuses: Callable[..., str | None] | None = None,
    any_number_of_experts: bool = False,
    flat: Callable[..., Sequence[Any]] = lambda *args: args,
) -> Operator:
    """The record of a loss, whose first argument are the logits: one tensor [K, B, C] or K tensors [B, C].

    ``refuses(backend, *args)`` says what its fused kernels do not take, beside what follows from the logits. A loss
    that takes ``any_number_of_experts`` gives the kernels eight at a time. Without ``fused`` there is the reference
    alone. ``flat`` makes of the arguments behind the logits those of the schema.
    """
    operator = Operator(name, schema, composite)

    def reference(logits: Tensor | Sequence[Tensor], *args: Any) -> Any:
        return operator.op(stacked(logits), *flat(*args))

    def refuses_arguments(backend: str, logits: Tensor | Sequence[Tensor], *args: Any) -> str | None:
        reason = _refuses_logits(backend, logits, any_number_of_experts)
        return reason if reason is not None or refuses is None else refuses(backend, logits, *args)

    operator.add("reference", reference)
    if fused is not None:
        operator.add_fused(fused, refuses_arguments)
    return operator


def _refuses_logits(backend: str, logits: Tensor | Sequence[Tensor], any_number_of_experts: bool) -> str | None:
    first, count = (logits, logits.shape[0]) if isinstance(logits, Tensor) else (logits[0], len(logits))
    if (reason := refuses_tensor(backend, first, "the logits are")) is not None:
        return reason
    if count > MAX_EXPERTS and not any_number_of_experts:
        return f"it takes at most {MAX_EXPERTS} experts, got {count}"
    if first.shape[-1] > MAX_CLASSES:
        return f"it takes at most {MAX_CLASSES} classes, got {first.shape[-1]}"
    return None


def fused_loss(
    name: str,
    tensors: str,
    options: str,
    *,
    shown: int = 0,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Tensor],
    fake_forward: Callable[..., tuple[Tensor, ...]],
    both: Callable[..., tuple[tuple[Tensor, ...], Any] | None] | None = None,
) -> Fused:
    """The kernels of a loss as operators; only the logits are differentiable.

    The forward takes (logits, *tensors, *options, backend) and returns the loss, ``shown`` more results and what the
    backward needs; the backward returns one gradient [K, B, C]. The logits are a list of one tensor [K, B, C] or of K
    tensors [B, C], so that neither kind is copied.
    """
    fused = Fused(name, forward=forward, backward=backward, both=both, gradients=_gradients_of_logits, shown=shown)
    return fused.register(
        f"Tensor[] logits, {tensors}",
        f"{options}, str backend",
        "Tensor saved",
        results=f"({', '.join(['Tensor'] * (2 + shown))})",
        gradients="Tensor",
        fake_forward=fake_forward,
        fake_backward=lambda grad_output, logits, *_: gradient_like(logits),
    )


def _gradients_of_logits(gradient: Tensor, dims: int) -> Sequence[Tensor]:
    return (gradient,) if dims == 3 else gradient.unbind(0)
