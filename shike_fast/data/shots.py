"""Many-, medium- and few-shot classes (Liu et al., "Long-Tailed Recognition in an Open World", CVPR 2019)."""

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


def shot_names(class_counts: Tensor) -> list[str]:
    """The shot of each class, by name.

    Args:
        class_counts: int64 [C], training images of each class.
    """
    masks = shot_masks(class_counts)
    return [next(shot for shot in SHOTS if masks[shot][label]) for label in range(len(class_counts))]
