"""Transforms of photographs of any size, by Pillow: random resized crop, flip and colour jitter, or centre crop."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from shike_fast.data._random import integers, uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AREA = (0.08, 1.0)  # share of the image that a random crop covers
RATIO = (3 / 4, 4 / 3)  # its width : height
ATTEMPTS = 10
JITTER = 0.4

# Which random words of a sample decide what.
_AREAS = slice(0, ATTEMPTS)
_RATIOS = slice(ATTEMPTS, 2 * ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER_ORDER = range(2 * ATTEMPTS, 2 * ATTEMPTS + 4)
_JITTER = slice(_JITTER_ORDER + 1, _JITTER_ORDER + 4)
WORDS = _JITTER.stop

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

Box = tuple[int, int, int, int]  # left, top, right, bottom


def random_crop_box(width: int, height: int, words: NDArray[np.uint32]) -> Box:
    """Draw the window of a random resized crop (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015).

    The area is uniform, the aspect ratio log-uniform. Of ten draws the first that fits is used; if none fits, the
    largest centred window whose ratio is allowed.

    Args:
        width, height: size of the image in pixels.
        words: the sample's random words, uint32 [WORDS].
    """
    areas = width * height * (AREA[0] + (AREA[1] - AREA[0]) * uniform(words[_AREAS]))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratios = np.exp(low + (high - low) * uniform(words[_RATIOS]))
    for w, h in zip(np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios)), strict=True):
        if 0 < w <= width and 0 < h <= height:
            crop_width, crop_height = int(w), int(h)
            left = int(integers(words[_LEFT], width - crop_width + 1))
            top = int(integers(words[_TOP], height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    return centre_box(width, height, min(width, round(height * ratio)), min(height, round(width / ratio)))


def centre_box(width: int, height: int, crop_width: int, crop_height: int) -> Box:
    """The centred window of the given size."""
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def train_transform(image: Image.Image, size: int, words: NDArray[np.uint32], *, jitter: bool) -> Image.Image:
    """Random resized crop to ``size``, horizontal flip with probability 1/2, and optionally colour jitter.

    Jitter scales brightness, contrast and saturation by factors uniform in 1 ± 0.4, in random order.
    """
    box = random_crop_box(image.width, image.height, words)
    # Crop before resizing: resize(box=…) would let the filter reach beyond the window.
    image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    if integers(words[_FLIP], 2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter:
        factors = 1 + JITTER * (2 * uniform(words[_JITTER]) - 1)
        for k in _ORDERS[integers(words[_JITTER_ORDER], len(_ORDERS))]:
            image = _ENHANCERS[k](image).enhance(float(factors[k]))
    return image


def evaluation_transform(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to size · 256/224 and crop the centre."""
    short = round(size * 256 / 224)
    scale = short / min(image.width, image.height)
    width, height = max(short, int(image.width * scale)), max(short, int(image.height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop(centre_box(width, height, size, size))
