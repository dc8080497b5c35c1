"""The CIFAR-10 policy of AutoAugment (Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", CVPR
2019).

25 sub-policies of two operations each; one sub-policy is drawn per image, each of its operations is applied with its
own probability. Magnitudes and fill follow the form the long-tail literature trains with (and the published SHIKE run
used): ten levels per operation, random sign for the signed operations, rotation always counter-clockwise, fill value
128.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = 128

_UNIT = np.linspace(0.0, 0.9, 10)

# Ten magnitudes per operation; operations without a magnitude are absent.
MAGNITUDES: dict[str, np.ndarray] = {
    "shear_x": np.linspace(0, 0.3, 10),
    "shear_y": np.linspace(0, 0.3, 10),
    "translate_x": np.linspace(0, 150 / 331, 10),  # share of the image's side
    "translate_y": np.linspace(0, 150 / 331, 10),
    "rotate": np.linspace(0, 30, 10),  # degrees
    "color": _UNIT,  # distance of the enhancement factor from 1
    "contrast": _UNIT,
    "sharpness": _UNIT,
    "brightness": _UNIT,
    "posterize": np.round(np.linspace(8, 4, 10)),  # bits kept
    "solarize": np.linspace(256, 0, 10),  # grey levels from this one on are inverted
}


class Step(NamedTuple):
    """One operation of a sub-policy: its name, the probability that it is applied, and its level 0 … 9."""

    operation: str
    probability: float
    level: int


CIFAR10_POLICY: tuple[tuple[Step, Step], ...] = (
    (Step("invert", 0.1, 7), Step("contrast", 0.2, 6)),
    (Step("rotate", 0.7, 2), Step("translate_x", 0.3, 9)),
    (Step("sharpness", 0.8, 1), Step("sharpness", 0.9, 3)),
    (Step("shear_y", 0.5, 8), Step("translate_y", 0.7, 9)),
    (Step("autocontrast", 0.5, 8), Step("equalize", 0.9, 2)),
    (Step("shear_y", 0.2, 7), Step("posterize", 0.3, 7)),
    (Step("color", 0.4, 3), Step("brightness", 0.6, 7)),
    (Step("sharpness", 0.3, 9), Step("brightness", 0.7, 9)),
    (Step("equalize", 0.6, 5), Step("equalize", 0.5, 1)),
    (Step("contrast", 0.6, 7), Step("sharpness", 0.6, 5)),
    (Step("color", 0.7, 7), Step("translate_x", 0.5, 8)),
    (Step("equalize", 0.3, 7), Step("autocontrast", 0.4, 8)),
    (Step("translate_y", 0.4, 3), Step("sharpness", 0.2, 6)),
    (Step("brightness", 0.9, 6), Step("color", 0.2, 8)),
    (Step("solarize", 0.5, 2), Step("invert", 0.0, 3)),
    (Step("equalize", 0.2, 0), Step("autocontrast", 0.6, 0)),
    (Step("equalize", 0.2, 8), Step("equalize", 0.6, 4)),  # 0.6 as in the published code; some ports have 0.8
    (Step("color", 0.9, 9), Step("equalize", 0.6, 6)),
    (Step("autocontrast", 0.8, 4), Step("solarize", 0.2, 8)),
    (Step("brightness", 0.1, 3), Step("color", 0.7, 0)),
    (Step("solarize", 0.4, 5), Step("autocontrast", 0.9, 3)),
    (Step("translate_y", 0.9, 9), Step("translate_y", 0.7, 9)),
    (Step("autocontrast", 0.9, 2), Step("solarize", 0.8, 3)),
    (Step("equalize", 0.8, 8), Step("invert", 0.1, 3)),
    (Step("translate_y", 0.7, 9), Step("autocontrast", 0.9, 1)),
)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    # The matrix maps output to input coordinates.
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_fill(image))


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return FILL if image.mode == "L" else (FILL, FILL, FILL)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, magnitude, sign: kind(image).enhance(1 + magnitude * sign)


_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "shear_x": lambda i, m, sign: _affine(i, (1, m * sign, 0, 0, 1, 0), Image.Resampling.BICUBIC),
    "shear_y": lambda i, m, sign: _affine(i, (1, 0, 0, m * sign, 1, 0), Image.Resampling.BICUBIC),
    "translate_x": lambda i, m, sign: _affine(i, (1, 0, m * i.width * sign, 0, 1, 0), Image.Resampling.NEAREST),
    "translate_y": lambda i, m, sign: _affine(i, (1, 0, 0, 0, 1, m * i.height * sign), Image.Resampling.NEAREST),
    "rotate": lambda i, m, _: i.rotate(m, Image.Resampling.NEAREST, fillcolor=_fill(i)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "brightness": _enhance(ImageEnhance.Brightness),
    "posterize": lambda i, m, _: ImageOps.posterize(i, int(m)),
    "solarize": lambda i, m, _: ImageOps.solarize(i, int(np.ceil(m))),  # pixel < m is pixel < ceil(m)
    "autocontrast": lambda i, _m, _s: ImageOps.autocontrast(i),
    "equalize": lambda i, _m, _s: ImageOps.equalize(i),
    "invert": lambda i, _m, _s: ImageOps.invert(i),
}


def apply_step(image: Image.Image, step: Step, sign: int) -> Image.Image:
    """Apply one operation, whatever its probability.

    Args:
        image: mode "RGB" or "L".
        step: the operation and its level.
        sign: +1 or -1, the direction of the signed operations.
    """
    magnitude = float(MAGNITUDES[step.operation][step.level]) if step.operation in MAGNITUDES else 0.0
    return apply_operation(image, step.operation, magnitude, sign)


def apply_operation(image: Image.Image, operation: str, magnitude: float, sign: int = 1) -> Image.Image:
    """Apply an operation at a magnitude in the units of :data:`MAGNITUDES`; operations without one ignore it.

    Args:
        image: mode "RGB" or "L".
        operation: its name.
        magnitude: may be negative where a direction has a meaning: a negative angle rotates clockwise.
        sign: +1 or -1, the direction of the signed operations.
    """
    return _OPERATIONS[operation](image, magnitude, sign)
