"""Training augmentations of small images held in memory, a whole batch at a time.

Images are uint8 [B, C, H, W] until they are normalised. Every function takes its random draws as arguments, so what it
does to a sample depends on that sample's draws alone, never on its neighbours in the batch.

This is the plain form, with NumPy and Pillow. :mod:`shike_fast.data.augment.batched` does the same on any device; what
the words of a sample decide (``crop_corners``, ``flips``, ``policy_draws``, ``hole_corners``) is defined here for both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shike_fast.data.augment.autoaugment import CIFAR10_POLICY, apply_step
from shike_fast.data.random import STREAM_AUGMENTATION, draw_words, integers, uniform

# Which random word of a sample decides what. The meaning of a word is the same in every augmentation.
_CROP_Y, _CROP_X, _FLIP, _POLICY, _APPLY1, _SIGN1, _APPLY2, _SIGN2, _CUTOUT_Y, _CUTOUT_X = range(10)

Words = NDArray[np.uint32]  # [B, words]
Pixels = NDArray[np.uint8]  # [B, C, H, W]
Positions = NDArray[np.int64]


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


def random_crop(images: Pixels, words: Words) -> Pixels:
    """Pad with zeros and cut a window of the old size at a uniformly drawn position."""
    height, width = images.shape[2:]
    pad_y, pad_x = padding_of(height), padding_of(width)
    padded = np.pad(images, ((0, 0), (0, 0), (pad_y, pad_y), (pad_x, pad_x)))
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))  # [B, C, 2·pad+1, 2·pad+1, H, W], no copy
    top, left = crop_corners(words, height, width)
    return windows[np.arange(len(images)), :, top, left]


def flips(words: Words) -> NDArray[np.bool_]:
    """Which samples are mirrored, [B]: each with probability 1/2."""
    return integers(words[:, _FLIP], 2) == 1


def random_flip(images: Pixels, words: Words) -> Pixels:
    """Mirror left to right with probability 1/2."""
    flipped = images[..., ::-1]
    return np.where(flips(words)[:, None, None, None], flipped, images)


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


def auto_augment(images: Pixels, words: Words) -> Pixels:
    """Apply one uniformly drawn sub-policy of the CIFAR-10 policy to each image."""
    draws = policy_draws(words)
    result = images.copy()
    for b in np.flatnonzero(draws.applied.any(1)):
        image = _to_image(images[b])
        for k in np.flatnonzero(draws.applied[b]):
            image = apply_step(image, CIFAR10_POLICY[draws.policies[b]][k], int(draws.signs[b, k]))
        result[b] = _to_pixels(image)
    return result


def hole_corners(words: Words, height: int, width: int) -> tuple[Positions, Positions]:
    """The upper left corner of each sample's Cutout hole: rows [B] and columns [B], negative outside the image.

    The centre is uniform over the pixels, so the hole may reach over the border.
    """
    rows = integers(words[:, _CUTOUT_Y], height) - cutout_of(height) // 2
    return rows, integers(words[:, _CUTOUT_X], width) - cutout_of(width) // 2


def cutout(images: Pixels, words: Words) -> Pixels:
    """Blacken one square hole per image (DeVries & Taylor, arXiv 1708.04552)."""
    height, width = images.shape[2:]
    top, left = hole_corners(words, height, width)
    rows, columns = span(top, height), span(left, width)
    return np.where(rows[:, None, :, None] & columns[:, None, None, :], np.uint8(0), images)


def span(start: Positions, side: int) -> NDArray[np.bool_]:
    """Which of ``side`` rows, or columns, a Cutout hole covers that starts at ``start`` [B]: [B, side]."""
    position = np.arange(side)[None, :]
    return (position >= start[:, None]) & (position < start[:, None] + cutout_of(side))


def _to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """[C, H, W] to Pillow: mode "L" for one channel, "RGB" for three."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


class Normalise:
    """uint8 pixels to float32: (pixel / 255 − mean) / std for each channel.

    Attributes:
        scale, shift: float32 [C, 1, 1]; the result is pixel · scale + shift, rounded after either operation.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        centre = torch.tensor(mean, dtype=torch.float64)[:, None, None]
        spread = torch.tensor(std, dtype=torch.float64)[:, None, None]
        self.scale = (1 / (255 * spread)).float()
        self.shift = (-centre / spread).float()

    def __call__(self, images: Pixels) -> Tensor:
        """Normalise uint8 [..., C, H, W]."""
        return torch.from_numpy(images).float().mul_(self.scale).add_(self.shift)


@dataclass(frozen=True)
class Augmentation:
    """A chain of steps on uint8 pixels, which normalisation follows.

    Attributes:
        words: random words used per sample.
        steps: applied in order.
        one_by_one: works on each image in turn, which is slow, rather than on the whole batch.
    """

    words: int
    steps: tuple[Callable[[Pixels, Words], Pixels], ...] = ()
    one_by_one: bool = False

    def draw(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> Words:
        """The random words of samples ``indices`` in an epoch, uint32 [B, words]."""
        return draw_words(seed, epoch, indices, self.words, STREAM_AUGMENTATION)

    def __call__(self, images: Pixels, words: Words, normalise: Normalise) -> Tensor:
        """Augment and normalise a batch: float32 [B, C, H, W]."""
        for step in self.steps:
            images = step(images, words)
        return normalise(images)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(0),
    "shift": Augmentation(_CROP_X + 1, (random_crop,)),
    "crop-flip": Augmentation(_FLIP + 1, (random_crop, random_flip)),
    "cifar": Augmentation(_CUTOUT_X + 1, (random_crop, random_flip, auto_augment, cutout), one_by_one=True),
}
