"""Training augmentations of photographs: flip, colour jitter and RandAugment, after the random resized crop.

The crop is not one of these steps: decoding cuts it out, by the first words of a sample
(:mod:`shike_fast.data.augment.crop`). The words after those are given their meaning here, the same in every
augmentation, so that a sample's crop, flip and factors do not change with what else is done to it.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.batched import Augmentation, Flip, Operations, Plan, Positions, Words
from shike_fast.data.augment.crop import CROP_WORDS
from shike_fast.data.augment.operations import BRIGHTNESS, COLOR, CONTRAST, RAND_OPERATORS, SIGNS, Shape, Variant
from shike_fast.data.random import integers, uniform

JITTER = 0.4  # greatest distance of a factor from 1
RAND_OPERATIONS = 2  # N of RandAugment: operations for an image
MAGNITUDE = 10  # M of RandAugment, from 0 to 10

# Which random words of a sample decide what.
_FLIP, _JITTER_ORDER, _FACTORS = range(CROP_WORDS, CROP_WORDS + 3)
_FACTOR_WORDS = slice(_FACTORS, _FACTORS + 3)
_OPERATION_WORDS = slice(_FACTOR_WORDS.stop, _FACTOR_WORDS.stop + RAND_OPERATIONS)
_SIGN_WORDS = slice(_OPERATION_WORDS.stop, _OPERATION_WORDS.stop + RAND_OPERATIONS)
WORDS = _SIGN_WORDS.stop

_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])


class PhotoFlip(Flip):
    """Mirror left to right with probability 1/2."""

    word = _FLIP


class JitterDraws(NamedTuple):
    """What the random words say of the colour jitter, for each sample of a batch."""

    order: Positions  # [B, 3], which factor is applied first, second, third: 0 brightness, 1 contrast, 2 saturation
    factors: NDArray[np.float64]  # [B, 3], of brightness, contrast and saturation


def jitter_draws(words: Words) -> JitterDraws:
    """Draw three factors uniformly from 1 ± 0.4, and one of the six orders."""
    factors = 1 + JITTER * (2 * uniform(words[:, _FACTOR_WORDS]) - 1)
    return JitterDraws(_ORDERS[integers(words[:, _JITTER_ORDER], len(_ORDERS))], factors)


class ColourJitter(Operations):
    """Scale brightness, contrast and saturation of each image by its own factors, in its own order.

    The factors travel as the bits of float32 numbers.
    """

    _operators = (BRIGHTNESS, CONTRAST, COLOR)

    def plan(self, words: Words) -> Plan:
        order, factors = jitter_draws(words)
        bits = factors.astype(np.float32).view(np.int32).astype(np.int64)
        rows = np.arange(len(words))
        return [array for k in range(3) for array in self._round(order[:, k], bits[rows, order[:, k]])]

    def _variants(self, number: int, variants: Tensor) -> Tensor:
        return variants.to(torch.int32).view(torch.float32)


class RandOperation(NamedTuple):
    """An operation of RandAugment at the magnitude M, and whether its direction is drawn."""

    operation: str
    magnitude: float = 0.0
    signed: bool = False

    @property
    def changes(self) -> bool:
        """False where no image is changed."""
        return self.operation != "identity" and (self.operation, self.magnitude) != ("solarize", 256)


_STRENGTH = MAGNITUDE / 10  # 1 is the end of AutoAugment's ranges
_FACTOR = 1.8 * _STRENGTH + 0.1 - 1  # distance of an enhancement factor from 1; the factor is 1.9 at M = 10

# The fourteen of the paper, with the ranges of its authors' code. That code runs two of them backwards, and so do the
# recipes of the long-tail literature: posterize keeps 4 bits at M = 10 and none at 0, and solarize inverts values from
# the threshold 256 · M/10 on, at M = 10 none at all: there it leaves every image as it is.
RAND_AUGMENT: tuple[RandOperation, ...] = (
    RandOperation("identity"),
    RandOperation("autocontrast"),
    RandOperation("equalize"),
    RandOperation("rotate", 30 * _STRENGTH, signed=True),  # degrees
    RandOperation("solarize", int(256 * _STRENGTH)),
    RandOperation("color", _FACTOR),
    RandOperation("posterize", int(4 * _STRENGTH)),
    RandOperation("contrast", _FACTOR),
    RandOperation("brightness", _FACTOR),
    RandOperation("sharpness", _FACTOR),
    RandOperation("shear_x", 0.3 * _STRENGTH, signed=True),
    RandOperation("shear_y", 0.3 * _STRENGTH, signed=True),
    RandOperation("translate_x", 0.45 * _STRENGTH, signed=True),  # share of the image's side
    RandOperation("translate_y", 0.45 * _STRENGTH, signed=True),
)


class RandDraws(NamedTuple):
    """What the random words say of RandAugment, for each sample of a batch."""

    operations: Positions  # [B, N], numbers of RAND_AUGMENT
    signs: Positions  # [B, N], +1 or -1


def rand_draws(words: Words) -> RandDraws:
    """Draw N operations uniformly, with replacement, and a sign for each."""
    operations = integers(words[:, _OPERATION_WORDS], len(RAND_AUGMENT))
    return RandDraws(operations, 2 * integers(words[:, _SIGN_WORDS], 2) - 1)


class RandAugment(Operations):
    """Apply N operations to each image (Cubuk et al., "RandAugment", CVPR Workshops 2020), filling with 128.

    Images are left alone by operations that change none.
    """

    _operators = RAND_OPERATORS

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        number_of = {operation: n for n, operator in enumerate(RAND_OPERATORS) for operation in operator.operations}
        # Only what can be drawn has rows in the tables: a row of a translation has a number for each pixel.
        variants: list[list[Variant]] = [[] for _ in RAND_OPERATORS]
        self._numbers = np.full(len(RAND_AUGMENT), -1)
        self._rows = np.zeros((len(RAND_AUGMENT), len(SIGNS)), np.int64)
        for k, (operation, magnitude, signed) in enumerate(RAND_AUGMENT):
            if RAND_AUGMENT[k].changes:
                known = variants[number_of[operation]]
                self._numbers[k] = number_of[operation]
                self._rows[k] = len(known) + np.arange(len(SIGNS)) * signed
                known += [Variant(operation, sign * magnitude, 1) for sign in (SIGNS if signed else (1,))]
        self._tables = [
            operator.tabulate(known, shape, device) for operator, known in zip(RAND_OPERATORS, variants, strict=True)
        ]

    def plan(self, words: Words) -> Plan:
        draws = rand_draws(words)
        result = []
        for k in range(RAND_OPERATIONS):
            operations, plus = draws.operations[:, k], (draws.signs[:, k] > 0).astype(int)
            result += self._round(self._numbers[operations], self._rows[operations, plus])
        return result


PHOTO_AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(0),
    "rrc": Augmentation(WORDS, (PhotoFlip,)),
    "rrc-jitter": Augmentation(WORDS, (PhotoFlip, ColourJitter), slow=True),
    "rrc-randaugment": Augmentation(WORDS, (PhotoFlip, RandAugment), slow=True),
    "rrc-jitter-randaugment": Augmentation(WORDS, (PhotoFlip, ColourJitter, RandAugment), slow=True),
}


def photo_augmentations(default: str) -> tuple[str, ...]:
    """The names of all of them, ``default`` first and "none" last."""
    others = [name for name in PHOTO_AUGMENTATIONS if name not in (default, "none")]
    return default, *others, "none"
