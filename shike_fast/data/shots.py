"""Many-, medium- and few-shot classes (Liu et al., "Long-Tailed Recognition in an Open World", CVPR 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor

SHOTS = ("many", "medium", "few")

MANY_SHOT_ABOVE = 100  # many: more than 100 training images
FEW_SHOT_BELOW = 20  # few: fewer than 20; medium: what lies between, 20 to 100


def shot_masks(class_counts: Tensor) -> dict[str, Tensor]:
    """Boolean masks [C] of the many-, medium- and few-shot classes.

    Args:
        class_counts: int64 [C], training images of each class. Many > 100, medium 20 to 100, few < 20.
    """
    many = class_counts > MANY_SHOT_ABOVE
    few = class_counts < FEW_SHOT_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


def shot_accuracy(predicted: Tensor, target: Tensor, class_counts: Tensor | Sequence[int]) -> dict[str, float | None]:
    """Accuracy in percent over all test images, and over those of the many-, medium- and few-shot classes.

    Args:
        predicted: int64 [N], the class that was predicted for each image.
        target: int64 [N], its class.
        class_counts: [C], training images of each class.

    Returns:
        ``top1``, ``many``, ``medium`` and ``few``; None without images.
    """
    counts = torch.as_tensor(class_counts)
    predicted, target = predicted.cpu(), target.cpu()
    correct, support = (labels.bincount(minlength=len(counts)) for labels in (target[predicted == target], target))
    return {"top1": _percent(correct, support)} | percent_by_shot(correct, support, counts.cpu())


def percent_by_shot(correct: Tensor, support: Tensor, class_counts: Tensor) -> dict[str, float | None]:
    """Accuracy in percent of the shots, from the images [C] of each class that are right, and all of them."""
    return {shot: _percent(correct[mask], support[mask]) for shot, mask in shot_masks(class_counts).items()}


def _percent(part: Tensor, whole: Tensor) -> float | None:
    """The share of two sums in percent; None of nothing."""
    total = int(whole.sum())
    return 100.0 * int(part.sum()) / total if total else None


def shot_names(class_counts: Tensor) -> list[str]:
    """The shot of each class, by name.

    Args:
        class_counts: int64 [C], training images of each class.
    """
    masks = shot_masks(class_counts)
    return [next(shot for shot in SHOTS if masks[shot][label]) for label in range(len(class_counts))]
