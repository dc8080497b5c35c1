"""Balanced softmax: the stage-2 objective over K experts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shike_fast.ops._checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    as_list,
    as_tensor,
    check_dense,
    check_device,
    check_logits,
    describe,
    values_are_readable,
)
from shike_fast.ops._guards import has_tangent
from shike_fast.ops._losses import loss_operator
from shike_fast.ops.cross_entropy import (
    check_either_target,
    composite_cross_entropy,
    fused_cross_entropy,
    refuses_soft_target,
)

if TYPE_CHECKING:
    import numpy as np

_NAME = "balanced_softmax_loss"


def balanced_softmax_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    class_counts: "Tensor | Sequence[float] | np.ndarray",
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute the balanced softmax loss of K experts, summed over the experts and averaged over the batch.

        L = Σ_k mean_b −log softmax(z_k + log n)[y]

    float16 and bfloat16 logits are computed in float32, and only the finished gradient is rounded; autocast does not
    change the result.

    A class without training images (``n[c] = 0``) is taken out of the softmax, since log 0 = −inf: its logit has no
    influence and gets no gradient. The loss stays finite unless such a class is a target, which makes it +inf.

    Args:
        logits: float16, bfloat16, float32 or float64 [K, B, C], or a list or tuple of K tensors [B, C]; any strides.
            K ≥ 1, C ≥ 2; B = 0 gives a loss of 0.
        target: int64 [B], classes in 0..C-1. A value out of range raises on the CPU in eager mode; elsewhere it is as
            undefined as for ``torch.nn.functional.cross_entropy``. Or class probabilities, floating point [B, C] or
            [K, B, C], as for :func:`expert_cross_entropy`, on the reference alone.
        class_counts: integer or floating point [C], the number of training images of each class, ≥ 0 and not all 0
            (values are checked on the CPU in eager mode). Treated as a constant. The logarithm is taken in float32, as
            in the published code, unless logits or counts are float64. A list, tuple or array, which counts as float64,
            is copied to the device of the logits in every call.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The loss, a scalar (float64 for float64 logits, else float32), differentiable with respect to the logits.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device or backend name, counts that require gradients, are negative, not finite or
            all zero.
        IndexError: a target out of range (CPU, eager).
        RuntimeError: the named backend cannot run.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, equation 4; SHIKE's
    stage 2.
    """
    first, shape = check_logits(_NAME, logits)
    check_either_target(_NAME, target, first, shape)
    counts = _checked_counts(as_tensor(class_counts, first.device), first, shape[2])
    loss: Tensor = _OPERATOR.run(backend, logits, target, counts)
    return loss


def _checked_counts(counts: object, first: Tensor, classes: int) -> Tensor:
    if not isinstance(counts, Tensor):
        kind = type(counts).__name__
        raise TypeError(f"{_NAME}: class_counts must be a tensor, list or array of numbers [C={classes}], got {kind}")
    check_dense(_NAME, "class_counts", counts)
    if counts.dtype not in INTEGER_DTYPES and counts.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{_NAME}: class_counts must be integer or floating point [C={classes}], got {describe(counts)}"
        )
    if counts.dim() != 1 or counts.shape[0] != classes:
        raise ValueError(f"{_NAME}: class_counts must be [C={classes}], got {describe(counts)}")
    if counts.requires_grad or has_tangent(counts):
        raise ValueError(f"{_NAME}: class_counts must not require gradients, they are constants of the loss")
    check_device(_NAME, "class_counts", counts, first, "logits")
    if values_are_readable(counts):
        smallest, largest = (value.item() for value in torch.aminmax(counts))
        if not (smallest >= 0 and 0 < largest < torch.inf):
            raise ValueError(
                f"{_NAME}: class_counts must be finite, >= 0 and not all 0, got values from {smallest} to {largest}"
            )
    return counts


def log_counts(class_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias log n [C] of logits of a dtype: float64 where they or the counts are, else float32, as published."""
    wide = torch.float64 in (dtype, class_counts.dtype)
    return class_counts.to(torch.float64 if wide else torch.float32).log()


def _composite(logits: Tensor, target: Tensor, class_counts: Tensor) -> Tensor:
    return composite_cross_entropy(logits, target, log_counts(class_counts, logits.dtype), 0.0)


def _fused(backend: str, logits: Tensor | Sequence[Tensor], target: Tensor, class_counts: Tensor) -> Tensor:
    bias = log_counts(class_counts, as_list(logits)[0].dtype)
    return fused_cross_entropy(backend, logits, target, bias, 0.0)


_OPERATOR = loss_operator(
    _NAME,
    "(Tensor logits, Tensor target, Tensor class_counts) -> Tensor",
    _composite,
    fused=_fused,
    refuses=refuses_soft_target,
    any_number_of_experts=True,
)
