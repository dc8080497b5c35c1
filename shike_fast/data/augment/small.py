"""Training augmentations of small images held in memory.

What a step does to a sample depends on that sample's random words alone, never on its neighbours in the batch.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.autoaugment import CIFAR10_POLICY
from shike_fast.data.augment.batched import Augmentation, BatchedStep, Flip, Operations, Plan, Positions, Words
from shike_fast.data.augment.operations import OPERATORS, SIGNS, VARIANTS, Shape, variant_of
from shike_fast.data.random import integers, uniform

# Which random word of a sample decides what. The meaning of a word is the same in every augmentation.
_CROP_Y, _CROP_X, _FLIP, _POLICY, _APPLY1, _SIGN1, _APPLY2, _SIGN2, _CUTOUT_Y, _CUTOUT_X = range(10)


def padding_of(side: int) -> int:
    """Zero padding of the random crop: 4 pixels at 28 and 32 (as published for CIFAR), less for smaller images."""
    return (side + 4) // 8


def cutout_of(side: int) -> int:
    """Side of the Cutout hole: 16 at 32 pixels (as published for CIFAR), always half the image."""
    return side // 2


def crop_corners(words: Words, height: int, width: int) -> tuple[Positions, Positions]:
    """The upper left corner of each sample's window in its padded image: rows [B] and columns [B]."""
    rows = integers(words[:, _CROP_Y], 2 * padding_of(height) + 1)
    return rows, integers(words[:, _CROP_X], 2 * padding_of(width) + 1)


class RandomCrop(BatchedStep):
    """Pad with zeros and cut a window of the old size at a uniformly drawn position."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        channels, self._height, self._width = shape
        self._pad_y, self._pad_x = (padding_of(side) for side in shape[1:])
        # Pixels of a row, a channel and an image that is padded.
        self._row = self._width + 2 * self._pad_x
        channel = self._row * (self._height + 2 * self._pad_y)
        self._image = channels * channel
        planes, rows = (torch.arange(count, device=device) for count in (channels, self._height))
        # Where the rows of a window start that lies in the corner of such an image, [C·H].
        self._starts = (planes[:, None] * channel + rows * self._row).flatten()

    def plan(self, words: Words) -> Plan:
        top, left = crop_corners(words, self._height, self._width)
        return [np.arange(len(words)) * self._image + top * self._row + left]

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        padded = F.pad(images, (self._pad_x, self._pad_x, self._pad_y, self._pad_y)).flatten()
        # Every run of W pixels, as overlapping rows of a view: one index a row then says what an index a pixel would.
        runs = padded.as_strided((max(0, len(padded) - self._width + 1), self._width), (1, 1))
        return runs.index_select(0, (plan[0][:, None] + self._starts).flatten()).view_as(images)


class RandomFlip(Flip):
    """Mirror left to right with probability 1/2."""

    word = _FLIP


class PolicyDraws(NamedTuple):
    """What the random words say of the CIFAR-10 policy, for each sample of a batch."""

    policies: Positions  # [B], the sub-policy
    applied: NDArray[np.bool_]  # [B, 2], whether its first and its second step are applied
    signs: Positions  # [B, 2], +1 or -1


def policy_draws(words: Words) -> PolicyDraws:
    """Draw a sub-policy uniformly, each of its steps with the step's probability, and a sign for either."""
    policies = integers(words[:, _POLICY], len(CIFAR10_POLICY))
    probabilities = np.array([[step.probability for step in steps] for steps in CIFAR10_POLICY])
    applied = uniform(words[:, (_APPLY1, _APPLY2)]) < probabilities[policies]
    return PolicyDraws(policies, applied, 2 * integers(words[:, (_SIGN1, _SIGN2)], 2) - 1)


class AutoAugment(Operations):
    """Apply one uniformly drawn sub-policy of the CIFAR-10 policy to each image, first step by first step."""

    _operators = OPERATORS

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        numbers = {
            operation: (number, k * VARIANTS)
            for number, operator in enumerate(OPERATORS)
            for k, operation in enumerate(operator.operations)
        }
        steps = [step for steps in CIFAR10_POLICY for step in steps]
        self._numbers = np.array([numbers[step.operation][0] for step in steps]).reshape(-1, 2)
        # [sub-policies, 2, signs]
        rows = [[numbers[s.operation][1] + variant_of(s.level, sign) for sign in SIGNS] for s in steps]
        self._rows = np.array(rows).reshape(-1, 2, 2)
        self._tables = [operator.prepare(shape, device) for operator in OPERATORS]

    def plan(self, words: Words) -> Plan:
        draws = policy_draws(words)
        result = []
        for k in range(2):
            operators = np.where(draws.applied[:, k], self._numbers[draws.policies, k], -1)
            result += self._round(operators, self._rows[draws.policies, k, (draws.signs[:, k] > 0).astype(int)])
        return result


def hole_corners(words: Words, height: int, width: int) -> tuple[Positions, Positions]:
    """The upper left corner of each sample's Cutout hole: rows [B] and columns [B], negative outside the image.

    The centre is uniform over the pixels, so the hole may reach over the border.
    """
    rows = integers(words[:, _CUTOUT_Y], height) - cutout_of(height) // 2
    return rows, integers(words[:, _CUTOUT_X], width) - cutout_of(width) // 2


def span(start: Positions, side: int) -> NDArray[np.bool_]:
    """Which of ``side`` rows, or columns, a Cutout hole covers that starts at ``start`` [B]: [B, side]."""
    position = np.arange(side)[None, :]
    return (position >= start[:, None]) & (position < start[:, None] + cutout_of(side))


class Cutout(BatchedStep):
    """Blacken one square hole per image (DeVries & Taylor, arXiv 1708.04552)."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._sides = shape[1:]
        # For each place of its centre the rows, or columns, that a hole keeps: all bits set, none in those it covers.
        self._kept_rows, self._kept_columns = (
            torch.from_numpy(~span(np.arange(side) - cutout_of(side) // 2, side)).to(torch.uint8).neg_().to(device)
            for side in self._sides
        )  # [H, H] and [W, W]

    def plan(self, words: Words) -> Plan:
        corners = hole_corners(words, *self._sides)
        return [corner + cutout_of(side) // 2 for corner, side in zip(corners, self._sides, strict=True)]

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        rows, columns = self._kept_rows.index_select(0, plan[0]), self._kept_columns.index_select(0, plan[1])
        # On a CPU this is several times as fast as masked_fill_.
        return images.bitwise_and_((rows[:, :, None] | columns[:, None])[:, None])


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(0),
    "shift": Augmentation(_CROP_X + 1, (RandomCrop,)),
    "crop-flip": Augmentation(_FLIP + 1, (RandomCrop, RandomFlip)),
    "cifar": Augmentation(_CUTOUT_X + 1, (RandomCrop, RandomFlip, AutoAugment, Cutout), slow=True),
}
