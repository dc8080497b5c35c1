"""Accuracy overall, by shot and by class, and the calibration error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shike_fast.errors import RunError

MANY_SHOT_ABOVE = 100  # many: more than 100 training images
FEW_SHOT_BELOW = 20  # few: fewer than 20; medium: what lies between, 20 to 100
CALIBRATION_BINS = 15

SHOTS = ("many", "medium", "few")


class EvaluationInterrupted(Exception):
    """``should_stop`` asked for an end before the last batch."""


class NonFiniteLogitsError(RunError):
    """The model answers with NaN or infinite logits."""


def shot_masks(class_counts: Tensor) -> dict[str, Tensor]:
    """Boolean masks [C] of the many-, medium- and few-shot classes.

    Args:
        class_counts: int64 [C], training images of each class. Many > 100, medium 20 to 100, few < 20.
    """
    many = class_counts > MANY_SHOT_ABOVE
    few = class_counts < FEW_SHOT_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a test set.

    Attributes:
        correct: int64 [C], rightly classified images of each class.
        support: int64 [C], images of each class.
        class_counts: int64 [C], training images of each class.
        expert_correct: int64 [K], images that each expert alone classifies rightly.
        calibration_error: expected calibration error in [0, 1] (15 bins, L1), or None where it was not asked for.
    """

    correct: Tensor
    support: Tensor
    class_counts: Tensor
    expert_correct: Tensor
    calibration_error: float | None = None

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent over all images."""
        return _percent(self.correct.sum(), self.support.sum())

    @property
    def class_accuracy(self) -> list[float | None]:
        """Accuracy of each class in percent; None for a class without test images."""
        return [
            _percent(c, n) if n else None for c, n in zip(self.correct.tolist(), self.support.tolist(), strict=True)
        ]

    @property
    def expert_top1(self) -> list[float]:
        """Top-1 accuracy of each expert alone, in percent."""
        total = self.support.sum()
        return [_percent(c, total) for c in self.expert_correct]

    def shots(self) -> dict[str, float | None]:
        """Accuracy in percent over the images of the many-, medium- and few-shot classes; None without images."""
        result: dict[str, float | None] = {}
        for shot, mask in shot_masks(self.class_counts).items():
            images = self.support[mask].sum()
            result[shot] = _percent(self.correct[mask].sum(), images) if images else None
        return result


def _percent(part: Tensor | int, whole: Tensor | int) -> float:
    return 100.0 * int(part) / int(whole)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    stage: int,
    class_counts: Tensor,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    calibration: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Accuracy of ``argmax_c mean_k z_k[c]``.

    Args:
        model: called as ``model(images, stage=stage)`` -> logits [K, B, C]; its training mode is restored afterwards.
        batches: pairs of images [B, channels, H, W] and int64 labels [B].
        stage: which classifiers to use (1 or 2).
        class_counts: int64 [C], training images of each class.
        device: where the model lives.
        autocast: makes the context around each forward pass.
        calibration: also compute the expected calibration error of ``softmax(mean_k z_k)`` (torchmetrics).
        should_stop: asked before every batch.

    Raises:
        EvaluationInterrupted: when ``should_stop()`` becomes true.
        ValueError: if there is not a single batch.
        NonFiniteLogitsError: if a logit is NaN or infinite.
    """
    num_classes = len(class_counts)
    calibration_error = None
    if calibration:
        from torchmetrics.classification import MulticlassCalibrationError

        calibration_error = MulticlassCalibrationError(num_classes, n_bins=CALIBRATION_BINS, norm="l1").to(device)
    correct = torch.zeros(num_classes, dtype=torch.int64, device=device)
    support = torch.zeros_like(correct)
    finite = torch.ones((), dtype=torch.bool, device=device)
    expert_correct: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            if should_stop():
                raise EvaluationInterrupted
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with autocast():
                logits = model(images, stage=stage)  # [K, B, C]
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            mean_logits = logits.mean(0)  # [B, C]
            finite &= mean_logits.isfinite().all()
            correct += torch.bincount(labels[mean_logits.argmax(-1) == labels], minlength=num_classes)
            support += torch.bincount(labels, minlength=num_classes)
            hits = (logits.argmax(-1) == labels).sum(-1)  # [K]
            expert_correct = hits if expert_correct is None else expert_correct + hits
            if calibration_error is not None:
                calibration_error.update(mean_logits.softmax(-1), labels)
    finally:
        model.train(was_training)
    if expert_correct is None:
        raise ValueError("evaluate: batches must hold at least one batch, got none")
    if not finite:
        raise NonFiniteLogitsError("the model's logits on the test images are not finite: its weights are lost")
    return Evaluation(
        correct.cpu(),
        support.cpu(),
        class_counts.cpu(),
        expert_correct.cpu(),
        None if calibration_error is None else float(calibration_error.compute()),
    )
