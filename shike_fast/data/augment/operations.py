"""Pillow's operations on batches of uint8 images, on any device, with the results of Pillow bit for bit.

An operation at one magnitude and with one sign is a :class:`Variant`. What a variant does to every pixel value, or
where it takes every pixel from, is asked of Pillow once and kept as a row of a table. AutoAugment's variants have ten
levels and two signs and are numbered 2 · level + (sign > 0); other augmentations name those they have.
What depends on the image (enhancements, equalize, autocontrast) or needs Pillow's filter (shear) follows Pillow's
arithmetic step by step: a product and a sum are rounded one after the other, never fused.

An :class:`Operator` serves one operation or several, so that the images of a batch that need it share its launches.
Nothing here has a shape that depends on values, and nothing is read back from the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from shike_fast.data.augment.autoaugment import FILL, MAGNITUDES

LEVELS = 10
SIGNS = (-1, 1)
VARIANTS = LEVELS * len(SIGNS)

Shape = tuple[int, int, int]  # C, H, W
Values = NDArray | np.generic


class Variant(NamedTuple):
    """An operation, its magnitude in the units of :data:`MAGNITUDES`, and the direction of a signed operation."""

    operation: str
    magnitude: float
    sign: int


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    matrix = (1, 0, x, 0, 1, y)  # output to input coordinates
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=FILL)


# What tables are made of: operations on grey images, of a magnitude and a sign.
_TABULATED: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "translate_x": lambda i, m, sign: _translate(i, m * i.width * sign, 0),
    "translate_y": lambda i, m, sign: _translate(i, 0, m * i.height * sign),
    "rotate": lambda i, m, _: i.rotate(m, Image.Resampling.NEAREST, fillcolor=FILL),
    "brightness": lambda i, m, sign: ImageEnhance.Brightness(i).enhance(1 + m * sign),
    "posterize": lambda i, m, _: ImageOps.posterize(i, int(m)),
    "solarize": lambda i, m, _: ImageOps.solarize(i, int(np.ceil(m))),  # pixel < m is pixel < ceil(m)
    "invert": lambda i, _m, _s: ImageOps.invert(i),
}


def _apply(variant: Variant, pixels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """A variant of a tabulated operation on a grey image [H, W]."""
    image = Image.fromarray(pixels.astype(np.uint8))
    return np.asarray(_TABULATED[variant.operation](image, variant.magnitude, variant.sign))


def variant_of(level: int, sign: int) -> int:
    """The number of a variant of AutoAugment among those of its operation."""
    return len(SIGNS) * level + (sign > 0)


def _variants_of(operation: str) -> list[Variant]:
    """Every variant of an operation that AutoAugment has, in the order of their numbers."""
    magnitudes = MAGNITUDES.get(operation, np.zeros(LEVELS))
    return [Variant(operation, float(magnitude), sign) for magnitude in magnitudes for sign in SIGNS]


class Operator(ABC):
    """Applies its operations to images of one shape.

    Attributes:
        operations: their names; AutoAugment's variant v of operation k is number k · VARIANTS + v of the operator.
    """

    def __init__(self, *operations: str) -> None:
        self.operations = operations

    def prepare(self, shape: Shape, device: torch.device) -> Tensor:
        """What the operator knows of AutoAugment's variants: [len(operations) · VARIANTS, ...] on the device."""
        return self.tabulate([v for operation in self.operations for v in _variants_of(operation)], shape, device)

    def tabulate(self, variants: Sequence[Variant], shape: Shape, device: torch.device) -> Tensor:
        """What the operator knows of some variants of its operations: a tensor [len(variants), ...] on the device."""
        return torch.from_numpy(np.stack([self._row(variant, shape) for variant in variants])).to(device)

    def _row(self, variant: Variant, shape: Shape) -> Values:
        """What the operator knows of one variant: nothing, unless it says more."""
        return np.zeros((), np.uint8)

    @abstractmethod
    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        """Apply to each image its own variant.

        Args:
            images: uint8 [B, C, H, W], contiguous; not changed.
            variants: [B, ...], the rows of the table that belong to the images.

        Returns:
            uint8 [B, C, H, W].
        """


def _to_bytes(values: Tensor) -> Tensor:
    """Values of 0 … 255, truncated to uint8. On a CPU only narrow integers have vector code for the last step."""
    return (values.to(torch.int16) if values.device.type == "cpu" else values).to(torch.uint8)


def _fill(images: Tensor, where: Tensor) -> Tensor:
    """FILL where a mask, broadcastable to uint8 images, is set; in place."""
    if images.device.type != "cpu":
        return images.masked_fill_(where, FILL)
    # On a CPU masked_fill_ takes twenty times as long as bits do.
    keep = where.to(torch.uint8).sub_(1)
    return images.bitwise_and_(keep).bitwise_or_(keep.bitwise_not_().bitwise_and_(FILL))


class Recolour(Operator):
    """Operations that map each value by itself, the same way in every image: one table of 256 values a variant."""

    def _row(self, variant: Variant, shape: Shape) -> NDArray[np.uint8]:
        return _apply(variant, np.arange(256)[None])[0]

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        return variants.gather(1, images.flatten(1).long()).view_as(images)


class Move(Operator):
    """Operations that take every pixel from some place, or fill it: the place of each pixel, -1 for none."""

    def _row(self, variant: Variant, shape: Shape) -> NDArray[np.int64]:
        _, height, width = shape

        def move(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return _apply(variant, values.reshape(height, width)).reshape(-1).astype(np.int64)

        place = np.arange(height * width)
        # Images hold bytes: the place travels as three of them, and whether it was filled shows on a black image.
        source = sum(move(place >> shift & 0xFF) << shift for shift in (0, 8, 16))
        return np.where(move(0 * place) == FILL, -1, source)

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        planes, places = images.flatten(2), variants[:, None]  # [B, C, H·W], [B, 1, H·W]
        moved = planes.gather(2, places.clamp(min=0).expand_as(planes))
        return _fill(moved, places < 0).view_as(images)


class Shear(Operator):
    """Pillow's bicubic filter along one axis; the coordinate across it falls on pixel centres, where it does nothing.

    Source: Keys, "Cubic convolution interpolation for digital image processing" (1981), with a = -1.
    """

    def __init__(self, operation: str, axis: int) -> None:
        super().__init__(operation)
        self._axis = axis

    def _row(self, variant: Variant, shape: Shape) -> Values:
        return np.float64(variant.sign * variant.magnitude)

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        rows = images.movedim(self._axis, 3)  # [B, C, across, along]
        across, length = rows.shape[2:]
        centre = torch.arange(max(across, length), dtype=torch.float64, device=images.device) + 0.5
        source = centre[:length] + variants[:, None, None] * centre[:across, None]  # [B, across, along]
        outside = (source < 0) | (source >= length)
        source -= 0.5
        before = source.floor()
        d = source.sub_(before)[:, None]
        # A row moves as a whole: the pixels that are not filled have one distance to ``before``, that of the last one
        # to be filled. So v1 … v4 are parts of a single run of the row, its ends repeated twice.
        move = torch.where(variants[:, None] < 0, before[..., -1] - (length - 1), before[..., 0]).long()
        first, last = rows[..., :1], rows[..., -1:]
        repeated = torch.cat((first, first, rows, last, last), 3)
        # A row that leaves the image reads from others what is then filled. No row moves further than the margin.
        margin = across + length
        flat = F.pad(repeated.flatten(), (margin, margin))
        runs = flat.as_strided((len(flat) - (length + 2), length + 3), (1, 1))
        begins = torch.arange(repeated[..., 0].numel(), device=images.device).mul_(length + 4).add_(margin + 1)
        begins = (begins.view(repeated.shape[:3]) + move[:, None]).flatten()
        values = runs.index_select(0, begins).view(*rows.shape[:3], length + 3).to(torch.int16)
        v1, v2, v3, v4 = (values[..., k : k + length] for k in range(4))
        rise = v2 - v1
        p4 = (v4 - v3).add_(rise)
        p2, p3 = v3 - v1, rise.add_(p4).neg_()
        # Conversions of their own: an operation on two types makes a slower one each time.
        value = p4.double().mul_(d).add_(p3.double()).mul_(d).add_(p2.double()).mul_(d).add_(v2.double())
        result = _fill(_to_bytes(value.clamp_(0, 255)), outside[:, None])
        return result.movedim(3, self._axis)


class Enhance(Operator):
    """Blend of the image with a degenerate form of it: degenerate + factor · (image - degenerate), truncated.

    Args:
        operation: its name.
        degenerate: makes float32 of integer values, broadcastable to the image, of the float32 image. None: black.
    """

    def __init__(self, operation: str, degenerate: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(operation)
        self._degenerate = degenerate

    def _row(self, variant: Variant, shape: Shape) -> Values:
        return np.float32(1 + variant.sign * variant.magnitude)

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        """As every operator; ``variants`` are the factors, float32 [B]."""
        values, factor = images.float(), variants[:, None, None, None]
        if self._degenerate is None:
            blend = values.mul_(factor)
        else:
            degenerate = self._degenerate(values)
            blend = values.sub_(degenerate).mul_(factor).add_(degenerate)
        return _to_bytes(blend.clamp_(0, 255))


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601-2 in Pillow's fixed point, float32 [B, 1, H, W]: the integers stay below 2**24, so all is exact."""
    if images.shape[1] == 1:
        return images.clone()
    red, green, blue = images.split(1, dim=1)
    return (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).mul_(2.0**-16).floor_()


def _mean_luma(images: Tensor) -> Tensor:
    """The mean rounded half up, float32 [B, 1, 1, 1], in integers: a floating-point mean may miss a half."""
    luma = _luma(images)
    count = luma[0].numel()
    # A row of fewer than 2**16 pixels stays below 2**24: exact, and much faster than a sum of integers.
    total = luma.sum(3, keepdim=True).sum((1, 2), keepdim=True, dtype=torch.int64)
    return ((2 * total + count) // (2 * count)).float()


def _smooth(images: Tensor) -> Tensor:
    """The 3 x 3 mean with the centre weighed five times, rounded; the border as it is."""
    result = images.clone()
    rows = (images[..., :-2] + images[..., 1:-1]).add_(images[..., 2:])
    total = (rows[..., :-2, :] + rows[..., 1:-1, :]).add_(rows[..., 2:, :])
    total.add_(images[..., 1:-1, 1:-1], alpha=4)  # small integers: exact, fused or not
    result[..., 1:-1, 1:-1] = total.add_(6.5).div_(13).floor_()
    return result


class Autocontrast(Operator):
    """Stretches the values of each channel to 0 … 255."""

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        pixels = images.flatten(2).flatten(0, 1)  # [B·C, H·W]
        low, high = pixels.amin(1, keepdim=True), pixels.amax(1, keepdim=True)
        value = torch.arange(256, device=images.device)
        span = (high - low).double()
        # Not 255 / span, which PyTorch rounds twice. In a channel of one value it is infinite, and not used.
        scale = torch.full_like(span, 255.0) / span
        stretched = value * scale + -low.double() * scale
        tables = torch.where(high > low, stretched.clamp_(0, 255), value).to(torch.uint8)
        return tables.gather(1, pixels.long()).view_as(images)


class Equalize(Operator):
    """Spreads the values of each channel so that they become about equally frequent."""

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        pixels = images.flatten(2).flatten(0, 1).long()  # [B·C, H·W]
        histogram = torch.zeros(len(pixels), 256, dtype=torch.int32, device=images.device)
        histogram.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=torch.int32))
        below = histogram.cumsum(1, dtype=torch.int32) - histogram
        of_highest = histogram.gather(1, pixels.amax(1, keepdim=True))
        step = (pixels.shape[1] - of_highest) // 255  # 0 leaves the channel as it is, so one of a single value, too
        spread = (below + step // 2) // step.clamp(min=1)
        value = torch.arange(256, dtype=torch.int32, device=images.device)
        tables = torch.where(step > 0, spread.clamp_(max=255), value).to(torch.uint8)
        return tables.gather(1, pixels).view_as(images)


CONTRAST = Enhance("contrast", _mean_luma)
COLOR = Enhance("color", _luma)
BRIGHTNESS = Enhance("brightness")
_GEOMETRY = (Move("translate_x", "translate_y", "rotate"), Shear("shear_x", axis=3), Shear("shear_y", axis=2))
_OF_CONTENT = (COLOR, CONTRAST, Enhance("sharpness", _smooth), Autocontrast("autocontrast"), Equalize("equalize"))

OPERATORS: tuple[Operator, ...] = (
    Recolour("invert", "posterize", "solarize", "brightness"),
    *_GEOMETRY,
    *_OF_CONTENT,
)
"""Those of AutoAugment."""

RAND_OPERATORS: tuple[Operator, ...] = (Recolour("posterize", "solarize"), BRIGHTNESS, *_GEOMETRY, *_OF_CONTENT)
"""Those of RandAugment: arithmetic is faster than a table where there is a group for brightness alone."""
