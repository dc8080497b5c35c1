"""Photographs of any size become squares: a window of them, or the centre, is resized."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.crop import Box, centre_box
from shike_fast.data.images.decode import REDUCTIONS, Picture

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MARGIN = 256 / 224  # of the test transform
_LONGEST = 4  # long over short side of what the test transform resizes


def training_pixels(picture: Picture, box: Box, result: Tensor) -> None:
    """Resize a window of an image.

    The image is decoded at a half, quarter or eighth of its size where the window still has the pixels that are wanted.

    Args:
        picture: the image.
        box: the window, in pixels of the whole image.
        result: uint8 [3, S, S], fastest where the channels of a pixel lie together.

    Raises:
        BrokenImageError: the image is damaged.
    """
    left, top, right, bottom = box
    resize_into(_window(picture, box, _reduction(min(right - left, bottom - top), result.shape[-1])), result)


def _window(picture: Picture, box: Box, reduction: int) -> NDArray[np.uint8]:
    """The pixels of a window of an image, decoded ``reduction`` times smaller if it can be."""
    left, top, right, bottom = box
    pixels = picture.pixels(reduction)
    scale = 1 if pixels.shape[:2] == (picture.height, picture.width) else reduction
    rows = slice(top // scale, -(-bottom // scale))
    columns = slice(left // scale, -(-right // scale))
    return pixels[rows, columns]


def evaluation_pixels(picture: Picture, result: Tensor, margin: float = MARGIN) -> None:
    """Resize the short side to size · margin and crop the centre.

    Very large images are decoded at a smaller size, at least twice the one wanted.

    Args:
        picture: the image.
        result: uint8 [3, size, size].
        margin: short side before over side after the crop.

    Raises:
        BrokenImageError: the image is damaged.
    """
    size = result.shape[-1]
    left, top, right, bottom = evaluation_box(picture.width, picture.height)
    width, height = evaluation_size(right - left, bottom - top, size, margin)
    reduction = _reduction(min(right - left, bottom - top), 2 * min(width, height))
    resized = resize(_window(picture, (left, top, right, bottom), reduction), width, height)
    left, top, right, bottom = centre_box(width, height, size, size)
    result.copy_(torch.from_numpy(resized[:, top:bottom, left:right]))


def evaluation_box(width: int, height: int) -> Box:
    """The part of an image that is resized for the test: all of it, but of a very long strip the middle.

    A strip of 10 x 20,000 pixels would else become one of 256 x 512,000, to keep 224 of them.
    """
    most = _LONGEST * min(width, height)
    return centre_box(width, height, min(width, most), min(height, most))


def evaluation_size(width: int, height: int, size: int, margin: float = MARGIN) -> tuple[int, int]:
    """Width and height after the short side was resized to size · margin."""
    short = round(size * margin)
    scale = short / min(width, height)
    return max(short, int(width * scale)), max(short, int(height * scale))


def resize(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """:func:`resize_into` a new array: uint8 [3, height, width], the channels of a pixel together."""
    result = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    resize_into(pixels, result)
    return result.numpy()


def resize_into(pixels: NDArray[np.uint8], result: Tensor) -> None:
    """Resize uint8 [H, W, 3] to uint8 [3, h, w] by a triangle filter as wide as the reduction, as Pillow's.

    PyTorch's vector code takes a fifth of Pillow's time; a value differs from Pillow's by one at most.
    """
    if not (pixels.flags.writeable and pixels.flags.c_contiguous):
        pixels = pixels.copy()  # PyTorch makes tensors of writable memory, and is faster where there are no gaps
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if image.shape[2:] == result.shape[1:]:
        result.copy_(image[0])
    else:
        # What interpolate(mode="bilinear", antialias=True) calls; that has no `out`, and would copy once more.
        torch.ops.aten._upsample_bilinear2d_aa.out(image, list(result.shape[1:]), False, out=result[None])


def _reduction(side: int, wanted: int) -> int:
    """How much smaller an image may be decoded of which ``side`` pixels are to become ``wanted``."""
    return next((reduction for reduction in REDUCTIONS if side >= reduction * wanted), 1)
