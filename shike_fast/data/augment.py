"""Training augmentations of small images held in memory, a whole batch at a time.

Images are uint8 [B, C, H, W] until they are normalised. Every function takes its random draws as arguments, so what it
does to a sample depends on that sample's draws alone, never on its neighbours in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shike_fast.data._random import STREAM_AUGMENTATION, draw_words, integers, uniform
from shike_fast.data.autoaugment import CIFAR10_POLICY, apply_step

# Which random word of a sample decides what. The meaning of a word is the same in every augmentation.
_CROP_Y, _CROP_X, _FLIP, _POLICY, _APPLY1, _SIGN1, _APPLY2, _SIGN2, _CUTOUT_Y, _CUTOUT_X = range(10)

Words = NDArray[np.uint32]  # [B, words]
Pixels = NDArray[np.uint8]  # [B, C, H, W]


def padding_of(side: int) -> int:
    """Zero padding of the random crop: 4 pixels at 28 and 32 (as published for CIFAR), less for smaller images."""
    return (side + 4) // 8


def cutout_of(side: int) -> int:
    """Side of the Cutout hole: 16 at 32 pixels (as published for CIFAR), always half the image."""
    return side // 2


def random_crop(images: Pixels, words: Words) -> Pixels:
    """Pad with zeros and cut a window of the old size at a uniformly drawn position."""
    height, width = images.shape[2:]
    pad_y, pad_x = padding_of(height), padding_of(width)
    padded = np.pad(images, ((0, 0), (0, 0), (pad_y, pad_y), (pad_x, pad_x)))
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))  # [B, C, 2·pad+1, 2·pad+1, H, W], no copy
    top = integers(words[:, _CROP_Y], 2 * pad_y + 1)
    left = integers(words[:, _CROP_X], 2 * pad_x + 1)
    return windows[np.arange(len(images)), :, top, left]


def random_flip(images: Pixels, words: Words) -> Pixels:
    """Mirror left to right with probability 1/2."""
    flipped = images[..., ::-1]
    return np.where((integers(words[:, _FLIP], 2) == 1)[:, None, None, None], flipped, images)


def auto_augment(images: Pixels, words: Words) -> Pixels:
    """Apply one uniformly drawn sub-policy of the CIFAR-10 policy to each image."""
    policies = integers(words[:, _POLICY], len(CIFAR10_POLICY))
    apply = uniform(words[:, (_APPLY1, _APPLY2)])
    signs = 2 * integers(words[:, (_SIGN1, _SIGN2)], 2) - 1
    result = images.copy()
    for b, policy in enumerate(policies):
        steps = [
            (step, int(sign))
            for step, draw, sign in zip(CIFAR10_POLICY[policy], apply[b], signs[b], strict=True)
            if draw < step.probability
        ]
        if not steps:
            continue
        image = _to_image(images[b])
        for step, sign in steps:
            image = apply_step(image, step, sign)
        result[b] = _to_pixels(image)
    return result


def cutout(images: Tensor, words: Words) -> None:
    """Zero one square hole per normalised image, in place (DeVries & Taylor, arXiv 1708.04552).

    The centre is uniform over the pixels, so the hole may reach over the border.
    """
    height, width = images.shape[2:]
    rows = _span(integers(words[:, _CUTOUT_Y], height), cutout_of(height), height)  # [B, H]
    columns = _span(integers(words[:, _CUTOUT_X], width), cutout_of(width), width)  # [B, W]
    images.masked_fill_(torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :]), 0.0)


def _span(centre: NDArray[np.int64], size: int, length: int) -> NDArray[np.bool_]:
    position = np.arange(length)[None, :]
    start = centre[:, None] - size // 2
    return (position >= start) & (position < start + size)


def _to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """[C, H, W] to Pillow: mode "L" for one channel, "RGB" for three."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


class Normalise:
    """uint8 pixels to float32: (pixel / 255 − mean) / std for each channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        centre = torch.tensor(mean, dtype=torch.float64)[:, None, None]
        spread = torch.tensor(std, dtype=torch.float64)[:, None, None]
        self._scale = (1 / (255 * spread)).float()
        self._shift = (-centre / spread).float()

    def __call__(self, images: Pixels) -> Tensor:
        """Normalise uint8 [..., C, H, W]."""
        return torch.from_numpy(images).float().mul_(self._scale).add_(self._shift)


@dataclass(frozen=True)
class Augmentation:
    """A chain of steps on uint8 pixels, and possibly one on the normalised images.

    Attributes:
        words: random words used per sample.
        one_by_one: works on each image in turn, which is slow, rather than on the whole batch.
        pixel_steps: applied in order before normalisation.
        final_step: applied in place after normalisation.
    """

    words: int
    pixel_steps: tuple[Callable[[Pixels, Words], Pixels], ...] = ()
    final_step: Callable[[Tensor, Words], None] | None = None
    one_by_one: bool = False

    def draw(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> Words:
        """The random words of samples ``indices`` in an epoch, uint32 [B, words]."""
        return draw_words(seed, epoch, indices, self.words, STREAM_AUGMENTATION)

    def __call__(self, images: Pixels, words: Words, normalise: Normalise) -> Tensor:
        """Augment and normalise a batch: float32 [B, C, H, W]."""
        for step in self.pixel_steps:
            images = step(images, words)
        batch = normalise(images)
        if self.final_step is not None:
            self.final_step(batch, words)
        return batch


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(0),
    "shift": Augmentation(_CROP_X + 1, (random_crop,)),
    "crop-flip": Augmentation(_FLIP + 1, (random_crop, random_flip)),
    "cifar": Augmentation(_CUTOUT_X + 1, (random_crop, random_flip, auto_augment), cutout, one_by_one=True),
}
