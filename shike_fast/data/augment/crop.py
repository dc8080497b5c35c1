"""The window of a random resized crop, which decoding cuts out of a photograph before all other augmentation."""

import math

import numpy as np
from numpy.typing import NDArray

from shike_fast.data.random import integers, uniform

AREA = (0.08, 1.0)  # fraction of the image that a random crop covers
RATIO = (3 / 4, 4 / 3)  # its width : height
ATTEMPTS = 10

# Which random words of a sample decide what.
_AREAS = slice(0, ATTEMPTS)
_RATIOS = slice(ATTEMPTS, 2 * ATTEMPTS)
_TOP, _LEFT = range(2 * ATTEMPTS, 2 * ATTEMPTS + 2)
CROP_WORDS = _LEFT + 1

Box = tuple[int, int, int, int]  # left, top, right, bottom


def random_crop_box(width: int, height: int, words: NDArray[np.uint32]) -> Box:
    """Draw the window of a random resized crop (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015).

    The area is uniform, the aspect ratio log-uniform. Of ten draws the first that fits is used; if none fits, the
    largest centred window whose ratio is allowed.

    Args:
        width, height: size of the image in pixels.
        words: the sample's random words, uint32 [CROP_WORDS] or more.
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
