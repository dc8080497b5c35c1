"""Divergences between experts, or between them and another teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from shike_fast.ops._checks import check_logits
from shike_fast.ops._expert_call import MASKS, OTHERS, ExpertOptions, ExpertTensors
from shike_fast.ops._expert_checks import (
    ExpertKL,
    Numbers,
    check_choice,
    check_labels,
    checked_mask,
    with_divergence,
)
from shike_fast.ops._expert_fused import expert_operator

_NAME = "expert_kl"


def expert_kl(
    logits: Tensor | Sequence[Tensor],
    teacher: str | Tensor | Sequence[Tensor] = OTHERS,
    *,
    temperature: float | Numbers = 1.0,
    detach: bool | None = None,
    weight: float | Tensor = 1.0,
    gate: Literal["teacher_correct"] | Tensor | None = None,
    reduction: str = "batchmean",
    weight_of: Literal["teacher", "student"] = "teacher",
    target: Tensor | None = None,
    class_mask: Tensor | None = None,
    masked: Literal["zero", "exclude", "partial"] = "zero",
    eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Compute the divergences between teachers and the K experts, as students.

        L = sum over teachers t and students k of  reduce_b  w g T^2 KL(softmax(t / T) || softmax(z_k / T))

    where T^2 is the square of the mean temperature. All pairs of experts cost O(K). Reductions: ``"batchmean"`` divides
    by B, ``"mean"`` by B C, ``"gated_mean"`` by the sum of the gates of a teacher or student, expert by expert, and
    gives 0 where that is 0.

    Args:
        logits: as of :func:`expert_loss`.
        teacher: ``"others"``: every other expert; ``"mean"``: the mean of the experts' logits; ``"view"``: the batch
            holds two views of B / 2 images, one after the other, and every expert's first view teaches its second; or
            logits [B, C] or [K, B, C] (or K tensors [B, C]) of another network, an average or a view.
        temperature: T, a positive number, or [C] for one a class.
        detach: whether the teacher is a constant. Default: only ``"others"`` gets a gradient. Any other gets one on the
            reference alone.
        weight: a number of either sign, [], [B] or [K, B]; with two views [B / 2] or [K, B / 2].
        gate: numbers or bool of these shapes, which also count in ``"gated_mean"``; or ``"teacher_correct"``: 1 where
            the largest of the teacher's row logits is at ``target``, else 0.
        weight_of: to whom rows of weights and gates [K, B] belong among ``"others"``; elsewhere they are the student's.
        target: int64 [B], for ``gate="teacher_correct"``.
        class_mask, masked: as of :func:`expert_loss`.
        eps: added to a student's probability within the logarithm, as in the published NCL (1e-9); ``"others"`` with a
            gradient through the teacher on the CPU backend and the reference, else on the reference alone.
        backend: as of :func:`expert_loss`.

    Returns:
        The loss, a scalar (float64 for float64 logits, else float32), differentiable with respect to the logits.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`expert_loss`.

    Source: Wang et al., RIDE, ICLR 2021 (mean); Li et al., NCL, CVPR 2022 (others); Zhao et al., MDCS, ICCV 2023
    (view).
    """
    first, shape = check_logits(_NAME, logits)
    check_choice(_NAME, "masked", masked, MASKS)
    if target is not None:
        check_labels(_NAME, "target", target, first, shape)
    tensors = ExpertTensors(
        target, class_mask=None if class_mask is None else checked_mask(_NAME, class_mask, first, shape)
    )
    options = ExpertOptions(False, masked="" if class_mask is None else masked)
    kl = ExpertKL(teacher, temperature, detach, weight, gate, reduction, weight_of, eps)  # type: ignore[arg-type]
    tensors, options = with_divergence(_NAME, kl, tensors, options, first, shape)
    loss, _, _ = _OPERATOR.run(backend, logits, None, tensors, options)
    return loss


_OPERATOR = expert_operator(_NAME)
