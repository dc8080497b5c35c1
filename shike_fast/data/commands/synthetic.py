"""Photographs that nobody took: pictures that a network can learn to tell apart, whatever training does to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

# Fractional parts of multiples of these fill the cube evenly (the roots of x⁴ = x + 1), so that any number of classes,
# and any few of them in a row, differ as much as they can.
_EVEN = tuple(1.2207440846057596**-k for k in (1, 2, 3))
_STRIPES = (2.5, 8.0)  # across the short side
_CELLS = (3, 6, 12, 24)  # of the clouds, each half as bright as the ones before
_BLOBS = 4


@dataclass(frozen=True)
class Style:
    """What the images of a class have in common.

    Attributes:
        hue: of the stripes, 0 … 1.
        angle: of the stripes in radians, 0 … π/2: mirroring makes -angle of it, which is no other class's.
        frequency: stripes across the short side.
        blob_hue: of the blobs, 0 … 1.
    """

    hue: float
    angle: float
    frequency: float
    blob_hue: float


def style_of(label: int) -> Style:
    """The style of a class: the same however many classes there are."""
    u = [(0.5 + even * label) % 1 for even in _EVEN]
    low, high = _STRIPES
    return Style(
        hue=u[0], angle=u[1] * math.pi / 2, frequency=low * (high / low) ** u[2], blob_hue=(u[0] + 0.3 + 0.4 * u[2]) % 1
    )


def image_sizes(count: int, short_side: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Widths and heights, int64 [count, 2]: the short side is given, the long one up to 4/3 of it, upright or not."""
    long = np.rint(short_side * (4 / 3) ** random.random(count)).astype(np.int64)
    upright = random.random(count) < 0.5
    short = np.full(count, short_side)
    return np.stack([np.where(upright, short, long), np.where(upright, long, short)], axis=1)


def render(style: Style, width: int, height: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """An image of a class: uint8 [height, width, 3]."""
    short = min(width, height)
    y = (np.arange(height, dtype=np.float32) / np.float32(short))[:, None]
    x = (np.arange(width, dtype=np.float32) / np.float32(short))[None, :]
    hue = style.hue + random.uniform(-0.015, 0.015)
    angle = style.angle + random.uniform(-0.06, 0.06)
    frequency = style.frequency * math.exp(random.uniform(-0.1, 0.1))
    wave = np.sin(
        np.float32(2 * math.pi * frequency) * (x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)))
        + np.float32(random.uniform(0, 2 * math.pi))
    )
    light = (0.5 + 0.5 * np.tanh(2 * wave))[..., None]  # [H, W, 1]
    bright, dark = _rgb(hue, 0.6, random.uniform(0.65, 0.9)), _rgb(hue + 0.04, 0.75, random.uniform(0.25, 0.45))
    image = dark + light * (bright - dark)
    blob = _rgb(style.blob_hue + random.uniform(-0.02, 0.02), 0.7, 0.7)
    image += _blobs(x, y, random)[..., None] * (blob - image)
    image *= 1 + 0.25 * _clouds(width, height, random)[..., None]
    image += random.standard_normal((height, width, 1), dtype=np.float32) * np.float32(0.02)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def _rgb(hue: float, saturation: float, value: float) -> Floats:
    k = (np.array([5, 3, 1], np.float32) + np.float32(6 * hue)) % 6
    return np.float32(value) * (1 - np.float32(saturation) * np.minimum(k, 4 - k).clip(0, 1)).astype(np.float32)


def _blobs(x: Floats, y: Floats, random: np.random.Generator) -> Floats:
    """How much of each pixel is covered by discs with soft edges: [H, W], 0 … 1; x is [1, W], y [H, 1]."""
    cover = np.zeros((y.size, x.size), np.float32)
    for _ in range(_BLOBS):
        cx, cy = random.uniform(0, x[0, -1]), random.uniform(0, y[-1, 0])
        radius = random.uniform(0.06, 0.14)
        distance = np.sqrt((x - np.float32(cx)) ** 2 + (y - np.float32(cy)) ** 2)
        cover = np.maximum(cover, ((np.float32(radius) - distance) * 30 + 0.5).clip(0, 1))
    return cover


def _clouds(width: int, height: int, random: np.random.Generator) -> Floats:
    """Noise with the spectrum of natural scenes, 1/f: [H, W], of standard deviation 1 or so."""
    total = np.zeros((height, width), np.float32)
    for octave, cells in enumerate(_CELLS):
        grid = random.standard_normal((cells, cells), dtype=np.float32) * np.float32(0.5**octave)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))
    return total
