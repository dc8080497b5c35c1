"""The operations of AutoAugment and RandAugment as Pillow does them."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from shike_fast.data.augment.autoaugment import FILL, MAGNITUDES, Step


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    # The matrix maps output to input coordinates.
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_fill(image))


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return FILL if image.mode == "L" else (FILL, FILL, FILL)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, magnitude, sign: kind(image).enhance(1 + magnitude * sign)


OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
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
    return OPERATIONS[operation](image, magnitude, sign)
