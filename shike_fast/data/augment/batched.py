"""The training augmentations of :mod:`.augment` and :mod:`.photo_augment` on uint8 tensors of any device, with the same
results.

Everything that depends on random words is decided on the host: the words are a pure function of seed, epoch and
index, so no device is asked. A *plan* is the list of integer arrays that say it; they travel to the device in one copy,
and the device then works through a small number of launches, whatever the number of images, with no synchronisation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment import photo, small
from shike_fast.data.augment.autoaugment import CIFAR10_POLICY
from shike_fast.data.augment.operations import (
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    OPERATORS,
    RAND_OPERATORS,
    SIGNS,
    VARIANTS,
    Operator,
    Shape,
    Variant,
    variant_of,
)
from shike_fast.data.augment.photo import RAND_AUGMENT, RAND_OPERATIONS
from shike_fast.data.augment.small import Augmentation, Normalise, Words

Plan = list[NDArray[np.int64]]

# Bytes of images that an operation takes on at a time. Its temporary results are up to fifty times as large. A CPU
# should find them in its caches; a GPU wants few, large launches, and has room for 0.4 GB.
_CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**23}
_ONE_THREAD = 2**15  # elements up to which an operation stays in one thread: at::internal::GRAIN_SIZE


def to_device(plans: Sequence[Plan], device: torch.device) -> list[list[Tensor]]:
    """The arrays of several plans as tensors of a device, in a single copy that the host does not wait for."""
    arrays = [array for plan in plans for array in plan]
    packed = torch.from_numpy(np.concatenate([*arrays, np.empty(0, np.int64)]))
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = iter(packed.to(device, non_blocking=True).split([len(array) for array in arrays]))
    return [[next(parts) for _ in plan] for plan in plans]


def images_at_a_time(device: torch.device, image_bytes: int) -> int:
    """How many images of so many bytes an operation takes on at a time on a device."""
    return max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // image_bytes)


def put(images: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Overwrite the images at ``positions`` by ``values``, in place. ``images`` is contiguous."""
    # Eight bytes at a time where that is possible: on a CPU it takes a sixth of the time.
    kind = torch.int64 if images.shape[1:].numel() % 8 == 0 else images.dtype
    images.flatten(1).view(kind).index_copy_(0, positions, values.flatten(1).view(kind))
    return images


class BatchedStep(ABC):
    """One step of an augmentation on images of one shape, on one device.

    Attributes:
        any_layout: it takes channels-last images as well as contiguous ones.
    """

    any_layout = False

    @abstractmethod
    def __init__(self, shape: Shape, device: torch.device) -> None: ...

    @abstractmethod
    def plan(self, words: Words) -> Plan:
        """What is to be done, as arrays whose number does not depend on the words."""

    @abstractmethod
    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        """Do it to images [B, C, H, W] that belong to the caller, in place where that is convenient."""


class RandomCrop(BatchedStep):
    """:func:`shike_fast.data.augment.small.random_crop`."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        channels, self._height, self._width = shape
        self._pad_y, self._pad_x = (small.padding_of(side) for side in shape[1:])
        # Pixels of a row, a channel and an image that is padded.
        self._row = self._width + 2 * self._pad_x
        channel = self._row * (self._height + 2 * self._pad_y)
        self._image = channels * channel
        planes, rows = (torch.arange(count, device=device) for count in (channels, self._height))
        # Where the rows of a window start that lies in the corner of such an image, [C·H].
        self._starts = (planes[:, None] * channel + rows * self._row).flatten()

    def plan(self, words: Words) -> Plan:
        top, left = small.crop_corners(words, self._height, self._width)
        return [np.arange(len(words)) * self._image + top * self._row + left]

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        padded = F.pad(images, (self._pad_x, self._pad_x, self._pad_y, self._pad_y)).flatten()
        # Every run of W pixels, as overlapping rows of a view: one index a row then says what an index a pixel would.
        runs = padded.as_strided((max(0, len(padded) - self._width + 1), self._width), (1, 1))
        return runs.index_select(0, (plan[0][:, None] + self._starts).flatten()).view_as(images)


class RandomFlip(BatchedStep):
    """:func:`shike_fast.data.augment.small.random_flip`."""

    _flips = staticmethod(small.flips)

    def __init__(self, shape: Shape, device: torch.device) -> None:
        pass

    def plan(self, words: Words) -> Plan:
        return [np.flatnonzero(self._flips(words))]

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        return put(images, plan[0], images.index_select(0, plan[0]).flip(3))


class PhotoFlip(RandomFlip):
    """:func:`shike_fast.data.augment.photo.random_flip`."""

    any_layout = True
    _flips = staticmethod(photo.flips)

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        if images.is_contiguous():
            return super().__call__(images, plan)
        interleaved = images.permute(0, 2, 3, 1)
        put(interleaved, plan[0], interleaved.index_select(0, plan[0]).flip(2))
        return images


class Operations(BatchedStep):
    """Operations in rounds, in each of which an image has one at most: operator by operator.

    The images that an operator serves are gathered, transformed, each with its own variant, and written back.
    """

    _operators: tuple[Operator, ...]

    def __init__(self, shape: Shape, device: torch.device) -> None:
        if shape[0] not in (1, 3):
            raise ValueError(f"{type(self).__name__}: images must have 1 or 3 channels, got {shape[0]}")

    def _round(self, operators: NDArray[np.int64], variants: NDArray[np.int64]) -> Plan:
        """The part of a plan that belongs to one round.

        Args:
            operators: number of the operator that serves each image, [B]; -1 for none.
            variants: what it is told, [B].
        """
        groups = [np.flatnonzero(operators == number) for number in range(len(self._operators))]
        return [array for positions in groups for array in (positions, variants[positions])]

    @abstractmethod
    def _variants(self, number: int, variants: Tensor) -> Tensor:
        """What operator ``number`` takes, of that which a plan says of a group of images."""

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        chunk = images_at_a_time(images.device, images.shape[1:].numel())
        for group, (all_positions, all_variants) in enumerate(zip(plan[::2], plan[1::2], strict=True)):
            if len(all_positions):
                number = group % len(self._operators)
                for positions, variants in zip(all_positions.split(chunk), all_variants.split(chunk), strict=True):
                    chosen = images.index_select(0, positions)
                    put(images, positions, self._operators[number](chosen, self._variants(number, variants)))
        return images


class AutoAugment(Operations):
    """:func:`shike_fast.data.augment.small.auto_augment`: the first step of the sub-policies, and then the second."""

    _operators = OPERATORS

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        numbers = {
            operation: (number, k * VARIANTS)
            for number, operator in enumerate(OPERATORS)
            for k, operation in enumerate(operator.operations)
        }
        steps = [step for steps in CIFAR10_POLICY for step in steps]
        self._numbers = np.array([numbers[step.operation][0] for step in steps]).reshape(-1, 2)
        # [sub-policies, 2, signs]
        rows = [[numbers[s.operation][1] + variant_of(s.level, sign) for sign in SIGNS] for s in steps]
        self._rows = np.array(rows).reshape(-1, 2, 2)
        self._tables = [operator.prepare(shape, device) for operator in OPERATORS]

    def plan(self, words: Words) -> Plan:
        draws = small.policy_draws(words)
        result = []
        for k in range(2):
            operators = np.where(draws.applied[:, k], self._numbers[draws.policies, k], -1)
            result += self._round(operators, self._rows[draws.policies, k, (draws.signs[:, k] > 0).astype(int)])
        return result

    def _variants(self, number: int, variants: Tensor) -> Tensor:
        return self._tables[number].index_select(0, variants)


class RandAugment(Operations):
    """:func:`shike_fast.data.augment.photo.rand_augment`; images are left alone by operations that change none."""

    _operators = RAND_OPERATORS

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        number_of = {operation: n for n, operator in enumerate(RAND_OPERATORS) for operation in operator.operations}
        # Only what can be drawn has rows in the tables: a row of a translation has a number for each pixel.
        variants: list[list[Variant]] = [[] for _ in RAND_OPERATORS]
        self._numbers = np.full(len(RAND_AUGMENT), -1)
        self._rows = np.zeros((len(RAND_AUGMENT), len(SIGNS)), np.int64)
        for k, (operation, magnitude, signed) in enumerate(RAND_AUGMENT):
            if RAND_AUGMENT[k].changes:
                known = variants[number_of[operation]]
                self._numbers[k] = number_of[operation]
                self._rows[k] = len(known) + np.arange(len(SIGNS)) * signed
                known += [Variant(operation, sign * magnitude, 1) for sign in (SIGNS if signed else (1,))]
        self._tables = [
            operator.tabulate(known, shape, device) for operator, known in zip(RAND_OPERATORS, variants, strict=True)
        ]

    def plan(self, words: Words) -> Plan:
        draws = photo.rand_draws(words)
        result = []
        for k in range(RAND_OPERATIONS):
            operations, plus = draws.operations[:, k], (draws.signs[:, k] > 0).astype(int)
            result += self._round(self._numbers[operations], self._rows[operations, plus])
        return result

    def _variants(self, number: int, variants: Tensor) -> Tensor:
        return self._tables[number].index_select(0, variants)


class ColourJitter(Operations):
    """:func:`shike_fast.data.augment.photo.colour_jitter`; the factors travel as the bits of float32 numbers."""

    _operators = (BRIGHTNESS, CONTRAST, COLOR)

    def plan(self, words: Words) -> Plan:
        order, factors = photo.jitter_draws(words)
        bits = factors.astype(np.float32).view(np.int32).astype(np.int64)
        rows = np.arange(len(words))
        return [array for k in range(3) for array in self._round(order[:, k], bits[rows, order[:, k]])]

    def _variants(self, number: int, variants: Tensor) -> Tensor:
        return variants.to(torch.int32).view(torch.float32)


class Cutout(BatchedStep):
    """:func:`shike_fast.data.augment.small.cutout`."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._sides = shape[1:]
        # For each place of its centre the rows, or columns, that a hole keeps: all bits set, none in those it covers.
        self._kept_rows, self._kept_columns = (
            torch.from_numpy(~small.span(np.arange(side) - small.cutout_of(side) // 2, side))
            .to(torch.uint8)
            .neg_()
            .to(device)
            for side in self._sides
        )  # [H, H] and [W, W]

    def plan(self, words: Words) -> Plan:
        corners = small.hole_corners(words, *self._sides)
        return [corner + small.cutout_of(side) // 2 for corner, side in zip(corners, self._sides, strict=True)]

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        rows, columns = self._kept_rows.index_select(0, plan[0]), self._kept_columns.index_select(0, plan[1])
        # On a CPU this is several times as fast as masked_fill_.
        return images.bitwise_and_((rows[:, :, None] | columns[:, None])[:, None])


_STEPS: dict[Callable, type[BatchedStep]] = {
    small.random_crop: RandomCrop,
    small.random_flip: RandomFlip,
    small.auto_augment: AutoAugment,
    small.cutout: Cutout,
    photo.random_flip: PhotoFlip,
    photo.colour_jitter: ColourJitter,
    photo.rand_augment: RandAugment,
}


class BatchedAugmentation:
    """An augmentation and the normalisation that follows it, on images of one shape and one device.

    Args:
        augmentation: one of :data:`shike_fast.data.augment.small.AUGMENTATIONS` or of
            :data:`shike_fast.data.augment.photo.PHOTO_AUGMENTATIONS`.
        normalise: of as many channels as the images have, or of one for all.
        shape: C, H, W of the images; C is 1 or 3 where the augmentation holds AutoAugment, RandAugment or
            colour jitter.
        device: where they are.

    Attributes:
        any_layout: no step wants contiguous images, so channels-last ones need not be rearranged.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(self, augmentation: Augmentation, normalise: Normalise, shape: Shape, device: torch.device) -> None:
        self._device = device
        self._steps = [_STEPS[step](shape, device) for step in augmentation.steps]
        self.any_layout = all(step.any_layout for step in self._steps)
        # A value for every entry of an interleaved row, [W·C]: one for a channel would make short inner loops.
        self._scale, self._shift = (
            values.flatten().expand(shape[0]).repeat(shape[2]).to(device)
            for values in (normalise.scale, normalise.shift)
        )

    def plan(self, words: Words) -> list[Plan]:
        """The plans of the steps."""
        return [step.plan(words) for step in self._steps]

    def augment(self, images: Tensor, plans: list[list[Tensor]]) -> Tensor:
        """All that comes before normalisation.

        Args:
            images: uint8 [B, C, H, W] on the device, contiguous or channels-last; may be overwritten.
            plans: from :meth:`plan`, on the device.

        Returns:
            uint8 [B, C, H, W], channels-last.
        """
        if not self.any_layout:
            images = images.contiguous()
        for step, plan in zip(self._steps, plans, strict=True):
            images = step(images, plan)
        if images.is_contiguous(memory_format=torch.channels_last):
            return images
        # On a CPU in half the time that contiguous(memory_format=torch.channels_last) takes.
        return torch.stack(images.unbind(1), -1).permute(0, 3, 1, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """What :meth:`augment` returns, or a slice of its images, as float32 [B, C, H, W], channels-last."""
        interleaved = pixels.permute(0, 2, 3, 1)
        rows = self._normalised(interleaved.flatten(2))  # [B, H, W·C]
        return rows.view(interleaved.shape).permute(0, 3, 1, 2)

    def _normalised(self, rows: Tensor) -> Tensor:
        if rows.device.type != "cpu" or rows.shape[1:].numel() <= _ONE_THREAD:
            return rows.float().mul_(self._scale).add_(self._shift)
        # A few rows at a time, which PyTorch does not share among threads: those would wait for the next piece of work
        # on the cores that the decoding processes need, three times as long as the work takes.
        result = torch.empty(rows.shape)
        count = max(1, _ONE_THREAD // rows.shape[2])
        for some, there in zip(rows.flatten(0, 1).split(count), result.flatten(0, 1).split(count), strict=True):
            there.copy_(some).mul_(self._scale).add_(self._shift)
        return result

    def __call__(self, images: Tensor, words: Words) -> Tensor:
        """Augment and normalise a batch, as :class:`shike_fast.data.augment.small.Augmentation` does.

        Args:
            images: uint8 [B, C, H, W] on the device, contiguous; may be overwritten.
            words: uint32 [B, words], from ``Augmentation.draw``.

        Returns:
            float32 [B, C, H, W], channels-last.
        """
        return self.normalise(self.augment(images, to_device(self.plan(words), self._device)))
