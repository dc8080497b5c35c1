"""Training augmentation: steps that work on a batch of uint8 images, on any device, with the same results everywhere.

Everything that depends on random words is decided on the host: the words are a pure function of seed, epoch and
index, so the device is never asked. A *plan* is the list of integer arrays that says it; the plans travel to the device
in one copy, and the device then works through a small number of launches, however many images there are, without
synchronisation.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.operations import Operator, Shape
from shike_fast.data.random import STREAM_AUGMENTATION, draw_words, integers

Words = NDArray[np.uint32]  # [B, words], the random words of each sample
Positions = NDArray[np.int64]
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


class Flip(BatchedStep):
    """Mirror left to right with probability 1/2, whatever the layout of the images.

    Attributes:
        word: the random word of a sample that decides it.
    """

    any_layout = True
    word: int

    def __init__(self, shape: Shape, device: torch.device) -> None:
        pass

    @classmethod
    def flips(cls, words: Words) -> NDArray[np.bool_]:
        """Which samples are mirrored, [B]."""
        return integers(words[:, cls.word], 2) == 1

    def plan(self, words: Words) -> Plan:
        return [np.flatnonzero(self.flips(words))]

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        if images.is_contiguous():
            return put(images, plan[0], images.index_select(0, plan[0]).flip(3))
        interleaved = images.permute(0, 2, 3, 1)
        put(interleaved, plan[0], interleaved.index_select(0, plan[0]).flip(2))
        return images


class Operations(BatchedStep):
    """Operations in rounds, in each of which an image has one at most: operator by operator.

    The images that an operator serves are gathered, transformed, each with its own variant, and written back.
    """

    _operators: tuple[Operator, ...]
    _tables: list[Tensor]

    def __init__(self, shape: Shape, device: torch.device) -> None:
        if shape[0] not in (1, 3):
            raise ValueError(f"{type(self).__name__}: images must have 1 or 3 channels, got {shape[0]}")

    def _round(self, operators: NDArray[np.int64], variants: NDArray[np.int64]) -> Plan:
        """The part of a plan that belongs to one round.

        Args:
            operators: number of the operator that serves each image, [B]; -1 for none.
            variants: which variant of its operations, or which other number, each image has, [B].
        """
        groups = [np.flatnonzero(operators == number) for number in range(len(self._operators))]
        return [array for positions in groups for array in (positions, variants[positions])]

    def _variants(self, number: int, variants: Tensor) -> Tensor:
        """What operator ``number`` takes for a group of images: by default the rows of its table that a plan names."""
        return self._tables[number].index_select(0, variants)

    def __call__(self, images: Tensor, plan: list[Tensor]) -> Tensor:
        chunk = images_at_a_time(images.device, images.shape[1:].numel())
        for group, (all_positions, all_variants) in enumerate(zip(plan[::2], plan[1::2], strict=True)):
            if len(all_positions):
                number = group % len(self._operators)
                for positions, variants in zip(all_positions.split(chunk), all_variants.split(chunk), strict=True):
                    chosen = images.index_select(0, positions)
                    put(images, positions, self._operators[number](chosen, self._variants(number, variants)))
        return images


class Normalise:
    """uint8 pixels to float32: (pixel / 255 − mean) / std for each channel.

    Attributes:
        scale, shift: float32 [C, 1, 1]; the result is pixel · scale + shift, rounded after either operation.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        centre = torch.tensor(mean, dtype=torch.float64)[:, None, None]
        spread = torch.tensor(std, dtype=torch.float64)[:, None, None]
        self.scale = (1 / (255 * spread)).float()
        self.shift = (-centre / spread).float()


@dataclass(frozen=True)
class Augmentation:
    """A chain of steps on uint8 pixels, which normalisation follows.

    Attributes:
        words: random words used per sample.
        steps: applied in order.
        slow: takes so long that worker processes pay off.
    """

    words: int
    steps: tuple[type[BatchedStep], ...] = ()
    slow: bool = False

    def draw(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> Words:
        """The random words of samples ``indices`` in an epoch that showed them ``repeats`` times before.

        The arguments are those of :func:`shike_fast.data.random.draw_words`; the result is uint32 [B, words].
        """
        return draw_words(seed, epoch, indices, self.words, STREAM_AUGMENTATION, repeats)


class BatchedAugmentation:
    """An augmentation and the normalisation that follows it, on images of one shape and one device.

    Args:
        augmentation: a value of ``AUGMENTATIONS`` in :mod:`shike_fast.data.augment.small`, or of
            ``PHOTO_AUGMENTATIONS`` in :mod:`shike_fast.data.augment.photo`.
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
        self._steps = [step(shape, device) for step in augmentation.steps]
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
        """Augment and normalise a batch.

        Args:
            images: uint8 [B, C, H, W] on the device, contiguous; may be overwritten.
            words: uint32 [B, words], from ``Augmentation.draw``.

        Returns:
            float32 [B, C, H, W], channels-last.
        """
        return self.normalise(self.augment(images, to_device(self.plan(words), self._device)))
