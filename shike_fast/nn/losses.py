"""The two losses with their options fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shike_fast import ops


class DKTLoss(nn.Module):
    """Stage-1 loss (dynamic knowledge transfer): :func:`shike_fast.ops.dkt_loss` with its options fixed.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], and returns a scalar. Args and
    Raises are those of the operator.
    """

    def __init__(
        self,
        *,
        hardest_weight: float = 10.0,
        mutual_weight: float = 1.0,
        kl_reduction: str = "mean",
        teacher_target_logit: float = 0.0,
        student_target_logit: float = -30.0,
        detach_teacher: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hardest_weight = hardest_weight
        self.mutual_weight = mutual_weight
        self.kl_reduction = kl_reduction
        self.teacher_target_logit = teacher_target_logit
        self.student_target_logit = student_target_logit
        self.detach_teacher = detach_teacher
        self.backend = backend

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        return ops.dkt_loss(
            logits,
            target,
            hardest_weight=self.hardest_weight,
            mutual_weight=self.mutual_weight,
            kl_reduction=self.kl_reduction,
            teacher_target_logit=self.teacher_target_logit,
            student_target_logit=self.student_target_logit,
            detach_teacher=self.detach_teacher,
            backend=self.backend,
        )


class BalancedSoftmaxLoss(nn.Module):
    """Stage-2 loss (classifier re-training): :func:`shike_fast.ops.balanced_softmax_loss` with its class counts.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], and returns a scalar. The counts
    follow ``.to(device)`` and stay out of the state_dict: they belong to the training set.

    Args:
        class_counts: int64 [C], training samples of each class, each at least 1.
        backend: as for the operator.
    """

    class_counts: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], *, backend: str | None = None) -> None:
        super().__init__()
        self.register_buffer("class_counts", torch.as_tensor(class_counts).clone(), persistent=False)
        self.backend = backend

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        return ops.balanced_softmax_loss(logits, target, self.class_counts, backend=self.backend)
