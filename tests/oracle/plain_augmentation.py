"""Every training augmentation in plain form, image by image with NumPy and Pillow: what the package's must equal.

What the random words of a sample decide is the package's; its own tests check that.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from pillow_operations import apply_operation, apply_step
from torch import Tensor

from shike_fast.data.augment import batched, photo, small
from shike_fast.data.augment.autoaugment import CIFAR10_POLICY
from shike_fast.data.augment.batched import Normalise, Words

Pixels = NDArray[np.uint8]  # [B, C, H, W]


def random_crop(images: Pixels, words: Words) -> Pixels:
    """Pad with zeros and cut a window of the old size at a uniformly drawn position."""
    height, width = images.shape[2:]
    pad_y, pad_x = small.padding_of(height), small.padding_of(width)
    padded = np.pad(images, ((0, 0), (0, 0), (pad_y, pad_y), (pad_x, pad_x)))
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))  # [B, C, 2·pad+1, 2·pad+1, H, W], no copy
    top, left = small.crop_corners(words, height, width)
    return windows[np.arange(len(images)), :, top, left]


def auto_augment(images: Pixels, words: Words) -> Pixels:
    """Apply one uniformly drawn sub-policy of the CIFAR-10 policy to each image."""
    draws = small.policy_draws(words)
    result = images.copy()
    for b in np.flatnonzero(draws.applied.any(1)):
        image = to_image(images[b])
        for k in np.flatnonzero(draws.applied[b]):
            image = apply_step(image, CIFAR10_POLICY[draws.policies[b]][k], int(draws.signs[b, k]))
        result[b] = to_pixels(image)
    return result


def cutout(images: Pixels, words: Words) -> Pixels:
    """Blacken one square hole per image (DeVries & Taylor, arXiv 1708.04552)."""
    height, width = images.shape[2:]
    top, left = small.hole_corners(words, height, width)
    rows, columns = small.span(top, height), small.span(left, width)
    return np.where(rows[:, None, :, None] & columns[:, None, None, :], np.uint8(0), images)


def random_flip(images: Pixels, words: Words) -> Pixels:
    """Mirror left to right with probability 1/2."""
    return np.where(small.RandomFlip.flips(words)[:, None, None, None], images[..., ::-1], images)


def photo_flip(images: Pixels, words: Words) -> Pixels:
    """The same, of photographs."""
    return np.where(photo.PhotoFlip.flips(words)[:, None, None, None], images[..., ::-1], images)


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def colour_jitter(images: Pixels, words: Words) -> Pixels:
    """Scale brightness, contrast and saturation of each image by factors of its own, in an order of its own."""
    draws = photo.jitter_draws(words)

    def jitter(image: Image.Image, b: int) -> Image.Image:
        for k in draws.order[b]:
            image = _ENHANCERS[k](image).enhance(float(draws.factors[b, k]))
        return image

    return one_by_one(images, jitter)


def rand_augment(images: Pixels, words: Words) -> Pixels:
    """Apply N operations to each image (Cubuk et al., "RandAugment", CVPR Workshops 2020), filling with 128."""
    draws = photo.rand_draws(words)

    def augment(image: Image.Image, b: int) -> Image.Image:
        for number, sign in zip(draws.operations[b], draws.signs[b], strict=True):
            image = rand_operation(image, photo.RAND_AUGMENT[number], int(sign))
        return image

    return one_by_one(images, augment)


def one_by_one(images: Pixels, transform: Callable[[Image.Image, int], Image.Image]) -> Pixels:
    """``transform`` of every image of a batch and its number there."""
    result = np.empty_like(images)
    for b, pixels in enumerate(images):
        result[b] = to_pixels(transform(to_image(pixels), b))
    return result


def rand_operation(image: Image.Image, operation: photo.RandOperation, sign: int) -> Image.Image:
    """One operation of RandAugment; ``sign`` is +1, or -1 for the other direction."""
    if operation.operation == "identity":
        return image
    magnitude = sign * operation.magnitude if operation.signed else operation.magnitude
    return apply_operation(image, operation.operation, magnitude)


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """[C, H, W] to Pillow: mode "L" for one channel, "RGB" for three."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def normalise(images: Pixels, statistics: Normalise) -> Tensor:
    """uint8 [..., C, H, W] to float32."""
    return torch.from_numpy(images).float().mul_(statistics.scale).add_(statistics.shift)


STEPS: dict[type[batched.BatchedStep], Callable[[Pixels, Words], Pixels]] = {
    small.RandomCrop: random_crop,
    small.RandomFlip: random_flip,
    small.AutoAugment: auto_augment,
    small.Cutout: cutout,
    photo.PhotoFlip: photo_flip,
    photo.ColourJitter: colour_jitter,
    photo.RandAugment: rand_augment,
}


def augment(augmentation: batched.Augmentation, images: Pixels, words: Words, statistics: Normalise) -> Tensor:
    """Augment and normalise a batch: float32 [B, C, H, W]."""
    for step in augmentation.steps:
        images = STEPS[step](images, words)
    return normalise(images, statistics)
