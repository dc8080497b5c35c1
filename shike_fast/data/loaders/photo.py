"""Batches of a data set of image files: decoded by worker processes, augmented on the training device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from shike_fast.data.images.broken import BrokenImages
from shike_fast.data.images.files import ImageDataset, PixelBatch, pixels_of_views
from shike_fast.data.loaders.loader import Batch, Loader, Request, joined
from shike_fast.data.loaders.prefetch import Prefetcher
from shike_fast.errors import warn


@dataclass(frozen=True)
class _Answer:
    """What a worker returns: a batch (pixels, or finished images) of each view, and how long they took."""

    views: tuple[PixelBatch, ...]
    seconds: float

    def pin_memory(self) -> _Answer:
        return replace(self, views=tuple(batch.pin_memory() for batch in self.views))


@dataclass(frozen=True)
class _LoadPixels:
    """Decodes a batch for all views and, where the images stay on the CPU, also augments it."""

    views: tuple[ImageDataset, ...]
    augment: bool

    def __call__(self, request: Request) -> _Answer:
        started = time.perf_counter()
        draws = [request.of_view(number, len(self.views)).draw for number in range(len(self.views))]
        batches = pixels_of_views(self.views, request.indices, draws)
        if self.augment:
            batches = [
                replace(batch, pixels=view.augmented(batch, seed=request.seed, epoch=request.epoch))
                for view, batch in zip(self.views, batches, strict=True)
            ]
        return _Answer(tuple(batches), time.perf_counter() - started)


class PhotoLoader(Loader):
    """:class:`shike_fast.data.Loader` for image files, whose pixels are augmented and normalised where training is.

    Worker processes decode, crop and resize, and send uint8, a quarter of the bytes of float32. A GPU, to which it goes
    through pinned memory, flips, jitters, applies RandAugment and normalises, prefetching one batch in a stream of its
    own. On a CPU the workers do all but the last. Batches are (images float32 [B, 3, S, S]
    channels-last, labels int64 [B]) on ``device``, the same for any number of workers.

    Args:
        dataset: the samples.
        batch_size: B, over all processes.
        shuffle: draw a new order every epoch, else file order.
        device: where training is.
        report: called with a line for each image that cannot be read; by default it prints a warning.
        most_broken: how many of them are allowed; None for a hundredth, but at least a hundred.
        options: as for :class:`shike_fast.data.Loader`, without ``pin_memory``.

    Raises:
        ValueError: an argument out of range, or a shuffled epoch whose last batch has less than one sample a process.
    """

    decodes = True
    dataset: ImageDataset
    views: tuple[ImageDataset, ...]

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        shuffle: bool,
        device: torch.device | str,
        report: Callable[[str], None] = warn,
        most_broken: int | None = None,
        **options: Any,
    ) -> None:
        self._device = torch.device(device)
        self._on_cpu = self._device.type == "cpu"
        self._prefetch = Prefetcher(self._device)
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, pin_memory=not self._on_cpu, **options)
        self.broken: BrokenImages = BrokenImages(len(dataset), dataset.stand_in, report, most_broken)
        self._seconds = 0.0
        self._images = 0

    @property
    def images_per_second(self) -> float | None:
        """What the workers can decode, and on a CPU augment, if nothing makes them wait; None at first."""
        return self._images * max(1, self.num_workers) / self._seconds if self._seconds else None

    def _load_function(self) -> Callable[[Request], Any]:
        return _LoadPixels(self.views, augment=self._on_cpu)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        answers = self._received(epoch, start_batch)
        if self._on_cpu:
            for batches in answers:
                yield self.dataset.normalised(joined([batch.pixels for batch in batches])), batches[0].labels
        else:
            yield from self._prefetch(partial(self._on_device, batches, epoch) for batches in answers)

    def _received(self, epoch: int, start_batch: int) -> Iterator[Sequence[PixelBatch]]:
        for answer in self._loaded(epoch, start_batch):
            self._seconds += answer.seconds
            self._images += len(answer.views[0].indices)
            for batch in answer.views:
                self.broken.add(batch.broken)
            yield answer.views

    def _on_device(self, batches: Sequence[PixelBatch], epoch: int) -> Batch:
        labels = batches[0].labels.to(self._device, non_blocking=True)
        seen = []
        for view, batch in zip(self.views, batches, strict=True):
            moved = replace(batch, pixels=batch.pixels.to(self._device, non_blocking=True))
            seen.append(view.augmented(moved, seed=self.seed, epoch=epoch))
        return self.dataset.normalised(joined(seen)), labels
