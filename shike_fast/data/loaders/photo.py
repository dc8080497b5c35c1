"""Batches of a data set of image files: decoded by worker processes, augmented on the training device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shike_fast.data.images.files import Broken, ImageDataset, PixelBatch, warn_of_broken
from shike_fast.data.loaders.loader import Batch, Loader, Request
from shike_fast.errors import DataError

# As many images may be broken before the run is stopped; of a large data set this share.
_MOST_BROKEN = 100
_MOST_BROKEN_SHARE = 0.01


def most_broken(images: int) -> int:
    """How many images of a set of this size may be broken before something else must be wrong."""
    return max(_MOST_BROKEN, int(_MOST_BROKEN_SHARE * images))


class BrokenImages:
    """The images of a data set that could not be read so far; each is reported once.

    Args:
        dataset: the data set.
        report: is told a line for each.
        most: so many are put up with; None for a hundredth of the images, but at least a hundred of them.
    """

    def __init__(
        self, dataset: ImageDataset, report: Callable[[str], None] = warn_of_broken, most: int | None = None
    ) -> None:
        self._report = report
        self._images = len(dataset)
        self._most = most_broken(len(dataset)) if most is None else most
        self._stand_in = dataset.stand_in
        self.messages: dict[int, str] = {}  # by number, without what stands for it

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, broken: Iterable[Broken]) -> None:
        """Take note of what was found in a batch.

        Raises:
            DataError: that makes too many to go on: the files may have gone altogether.
        """
        for image in broken:
            if image.index in self.messages:
                continue
            self.messages[image.index] = image.message
            self._report(f"{image.message}; {self._stand_in}")
            if len(self) > self._most:
                raise DataError(
                    f"{len(self)} of {self._images} images could not be read so far, the last one being "
                    f"{image.message}; look into it with: python -m shike_fast.data check"
                )


@dataclass(frozen=True)
class _Answer:
    """What a worker returns: a batch (pixels, or finished images), and how long it took."""

    batch: PixelBatch
    seconds: float

    def pin_memory(self) -> _Answer:
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class _LoadPixels:
    """Decodes a batch and, where the images stay on the CPU, also augments it."""

    source: ImageDataset
    augment: bool

    def __call__(self, request: Request) -> _Answer:
        started = time.perf_counter()
        batch = self.source.pixels(request.indices, seed=request.seed, epoch=request.epoch)
        if self.augment:
            batch = replace(batch, pixels=self.source.augmented(batch, seed=request.seed, epoch=request.epoch))
        return _Answer(batch, time.perf_counter() - started)


class PhotoLoader(Loader):
    """:class:`shike_fast.data.Loader` for image files, whose pixels are augmented and normalised where training is.

    Worker processes decode, crop and resize, and send uint8, a quarter of the bytes of float32. A GPU, to which it goes
    through page-locked memory, flips, jitters, applies RandAugment and normalises one batch ahead of the one in use, in
    a stream of its own. On a CPU the workers do all but the last. Batches are (images float32 [B, 3, S, S]
    channels-last, labels int64 [B]) on ``device``, the same for any number of workers.

    Args:
        dataset: the samples.
        batch_size: B, over all processes.
        shuffle: draw a new order every epoch, else file order.
        device: where training is.
        report: is told a line for each image that cannot be read; by default standard error is.
        most_broken: so many of them are put up with; None for a hundredth, but at least a hundred.
        options: as for :class:`shike_fast.data.Loader`, without ``pin_memory``.

    Raises:
        ValueError: an argument out of range, or a shuffled epoch whose last batch has less than one sample a process.
    """

    dataset: ImageDataset

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        shuffle: bool,
        device: torch.device | str,
        report: Callable[[str], None] = warn_of_broken,
        most_broken: int | None = None,
        **options: Any,
    ) -> None:
        self._device = torch.device(device)
        self._on_cpu = self._device.type == "cpu"
        self._one_ahead = OneAhead(self._device)
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, pin_memory=not self._on_cpu, **options)
        self.broken = BrokenImages(dataset, report, most_broken)
        self._seconds = 0.0
        self._images = 0

    @property
    def images_per_second(self) -> float | None:
        """What the workers can decode, and on a CPU augment, if nobody makes them wait; None before the first batch."""
        return self._images * max(1, self.num_workers) / self._seconds if self._seconds else None

    def _load_function(self) -> Callable[[Request], Any]:
        return _LoadPixels(self.dataset, augment=self._on_cpu)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        answers = self._received(epoch, start_batch)
        if self._on_cpu:
            for batch in answers:
                yield self.dataset.normalised(batch.pixels), batch.labels
        else:
            yield from self._one_ahead(partial(self._on_device, batch, epoch) for batch in answers)

    def _received(self, epoch: int, start_batch: int) -> Iterator[PixelBatch]:
        for answer in self._loaded(epoch, start_batch):
            self._seconds += answer.seconds
            self._images += len(answer.batch.indices)
            self.broken.add(answer.batch.broken)
            yield answer.batch

    def _on_device(self, batch: PixelBatch, epoch: int) -> Batch:
        moved = replace(batch, pixels=batch.pixels.to(self._device, non_blocking=True))
        labels = batch.labels.to(self._device, non_blocking=True)
        return self.dataset.normalised(self.dataset.augmented(moved, seed=self.seed, epoch=epoch)), labels


class OneAhead:
    """Begins work on a device in a stream of its own, each piece before the one before it is handed out.

    The stream is the same in all epochs: what PyTorch keeps of the memory used in one stream serves no other.

    Args:
        device: where the work is done. Without streams there, each piece is simply done when it is its turn.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, jobs: Iterator[Callable[[], tuple[Tensor, ...]]]) -> Iterator[Any]:
        """The results of ``jobs``."""
        if self._device.type != "cuda":
            for job in jobs:
                yield job()
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        waiting: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None
        for job in jobs:
            with torch.cuda.stream(self._stream):
                begun = job()
                event = self._stream.record_event()
            if waiting is not None:
                yield _handed_over(*waiting, self._device)
            waiting = begun, event
        if waiting is not None:
            yield _handed_over(*waiting, self._device)


def _handed_over(tensors: tuple[Tensor, ...], event: torch.cuda.Event, device: torch.device) -> tuple[Tensor, ...]:
    """Let the device's present stream wait for what made the tensors, and their memory live until it has used them."""
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in tensors:
        tensor.record_stream(current)
    return tensors
