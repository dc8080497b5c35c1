"""Training augmentations of photographs: flip, colour jitter and RandAugment, after the random resized crop.

The crop is no step of theirs: decoding cuts it out, by the first words of a sample
(:mod:`shike_fast.data.images.transforms`). The words that follow are given their meaning here, the same in every
augmentation, so that a sample's crop, flip and factors do not change with what else is done to it.

As in :mod:`shike_fast.data.augment.small` this is the plain form, image by image with Pillow;
:mod:`shike_fast.data.augment.batched` does the same on any device with the results bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from shike_fast.data.augment.autoaugment import apply_operation
from shike_fast.data.augment.small import Augmentation, Pixels, Positions, Words, _to_image, _to_pixels
from shike_fast.data.images.transforms import CROP_WORDS
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

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])


def flips(words: Words) -> NDArray[np.bool_]:
    """Which samples are mirrored, [B]: each with probability 1/2."""
    return integers(words[:, _FLIP], 2) == 1


def random_flip(images: Pixels, words: Words) -> Pixels:
    """Mirror left to right with probability 1/2."""
    return np.where(flips(words)[:, None, None, None], images[..., ::-1], images)


class JitterDraws(NamedTuple):
    """What the random words say of the colour jitter, for each sample of a batch."""

    order: Positions  # [B, 3], which factor is applied first, second, third: 0 brightness, 1 contrast, 2 saturation
    factors: NDArray[np.float64]  # [B, 3], of brightness, contrast and saturation


def jitter_draws(words: Words) -> JitterDraws:
    """Draw three factors uniformly from 1 ± 0.4, and one of the six orders."""
    factors = 1 + JITTER * (2 * uniform(words[:, _FACTOR_WORDS]) - 1)
    return JitterDraws(_ORDERS[integers(words[:, _JITTER_ORDER], len(_ORDERS))], factors)


def colour_jitter(images: Pixels, words: Words) -> Pixels:
    """Scale brightness, contrast and saturation of each image by factors of its own, in an order of its own."""
    draws = jitter_draws(words)

    def jitter(image: Image.Image, b: int) -> Image.Image:
        for k in draws.order[b]:
            image = _ENHANCERS[k](image).enhance(float(draws.factors[b, k]))
        return image

    return _one_by_one(images, jitter)


class RandOperation(NamedTuple):
    """An operation of RandAugment at the magnitude M, and whether its direction is drawn."""

    operation: str
    magnitude: float = 0.0
    signed: bool = False

    def apply(self, image: Image.Image, sign: int) -> Image.Image:
        """Apply it to an image of mode "RGB" or "L"; ``sign`` is +1, or -1 for the other direction."""
        if self.operation == "identity":
            return image
        return apply_operation(image, self.operation, sign * self.magnitude if self.signed else self.magnitude)

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


def rand_augment(images: Pixels, words: Words) -> Pixels:
    """Apply N operations to each image (Cubuk et al., "RandAugment", CVPR Workshops 2020), filling with 128."""
    draws = rand_draws(words)

    def augment(image: Image.Image, b: int) -> Image.Image:
        for number, sign in zip(draws.operations[b], draws.signs[b], strict=True):
            image = RAND_AUGMENT[number].apply(image, int(sign))
        return image

    return _one_by_one(images, augment)


def _one_by_one(images: Pixels, transform: Callable[[Image.Image, int], Image.Image]) -> Pixels:
    """``transform`` of every image of a batch and its number there."""
    result = np.empty_like(images)
    for b, pixels in enumerate(images):
        result[b] = _to_pixels(transform(_to_image(pixels), b))
    return result


PHOTO_AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(0),
    "rrc": Augmentation(WORDS, (random_flip,)),
    "rrc-jitter": Augmentation(WORDS, (random_flip, colour_jitter), one_by_one=True),
    "rrc-randaugment": Augmentation(WORDS, (random_flip, rand_augment), one_by_one=True),
    "rrc-jitter-randaugment": Augmentation(WORDS, (random_flip, colour_jitter, rand_augment), one_by_one=True),
}
