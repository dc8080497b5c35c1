"""Batches of image files that the GPU itself decodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.crop import random_crop_box
from shike_fast.data.images.broken import Broken, BrokenImages
from shike_fast.data.images.decode import open_image
from shike_fast.data.images.files import ImageDataset, PixelBatch
from shike_fast.data.images.gpu_decode import DecodeBatch, Resizing, hardware_decoder, resize_windows
from shike_fast.data.images.transforms import evaluation_box, evaluation_size
from shike_fast.data.loaders.loader import Batch, EpochLoader
from shike_fast.data.loaders.prefetch import Prefetcher
from shike_fast.errors import warn

_BATCHES_AHEAD = 3  # whose files are being read
_MOST_PIXELS = 2**24  # of an image that the GPU decodes; larger ones the CPU decodes at a reduced size
_PIXELS_AT_A_TIME = 2**27  # of images that are on the GPU together: 400 MB


@dataclass(frozen=True)
class _Read:
    """An image on its way to the decoder.

    Attributes:
        source: encoded bytes [n] where the GPU can decode them, else the finished square [3, S, S].
        plan: what becomes of its pixels.
        pixels: how many the decoded image has.
        label: its class.
        broken: images before it that could not be read.
    """

    source: Tensor
    plan: Resizing
    pixels: int
    label: int
    broken: tuple[Broken, ...]


class GpuPhotoLoader(EpochLoader):
    """:class:`shike_fast.data.PhotoLoader` with the decoding, cropping and resizing on the GPU as well.

    Threads read files, or records of a pack, and what a JPEG says of itself. What is not for the GPU's decoder
    (other formats, CMYK, rotated, truncated or very large images) they decode by the rules of
    :mod:`shike_fast.data.images.decode`; if it fails, the CPU decodes all images that it was given together, and a
    warning says so once. The same windows are drawn and the same augmentation is applied as by the other loaders; the
    GPU's decoder rounds differently, so that values differ a little from those that libjpeg-turbo gives.

    Args:
        dataset: the samples.
        batch_size: B, over all processes.
        shuffle: draw a new order every epoch, else file order.
        device: the GPU.
        seed: of order and augmentation; None takes the data set's.
        num_workers: reading threads.
        report: called with a line for each image that cannot be read; by default it prints a warning.
        decode: decodes batches of JPEG on ``device``; None for
            :func:`shike_fast.data.images.gpu_decode.hardware_decoder`.
        rank, world_size: this process and the number of processes that train together.

    Raises:
        NoHardwareDecoderError: there is no such decoder.
        ValueError: an argument out of range, or a shuffled epoch whose last batch has less than one sample a process.
    """

    decodes = True
    dataset: ImageDataset

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        shuffle: bool,
        device: torch.device | str,
        seed: int | None = None,
        num_workers: int = 4,
        report: Callable[[str], None] = warn,
        decode: DecodeBatch | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self._device = torch.device(device)
        self._prefetch = Prefetcher(self._device)
        self._decode = decode or hardware_decoder(self._device)
        self._threads = max(1, num_workers)
        self.broken: BrokenImages = BrokenImages(len(dataset), dataset.stand_in, report)
        self._warned = False
        self._seconds = 0.0
        self._images = 0

    @property
    def images_per_second(self) -> float | None:
        """What reading, decoding and resizing keep up with, as far as the host can tell; None at first."""
        return self._images / self._seconds if self._seconds else None

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                reads = self._reads(pool, epoch, start_batch)
                yield from self._prefetch(partial(self._on_device, *read, epoch) for read in reads)
            finally:
                pool.shutdown(cancel_futures=True)

    def _reads(
        self, pool: ThreadPoolExecutor, epoch: int, start_batch: int
    ) -> Iterator[tuple[NDArray[np.int64], list[_Read]]]:
        """The images of each batch, while the files of the next ones are being read."""
        ahead: deque[tuple[NDArray[np.int64], list[Future[_Read]]]] = deque()
        for indices in self._shards(epoch, start_batch):
            words = self.dataset.augment.draw(indices, seed=self.seed, epoch=epoch)
            ahead.append((indices, [pool.submit(self._read, int(i), words[b]) for b, i in enumerate(indices)]))
            if len(ahead) > _BATCHES_AHEAD:
                yield self._collected(*ahead.popleft())
        while ahead:
            yield self._collected(*ahead.popleft())

    def _collected(
        self, indices: NDArray[np.int64], futures: list[Future[_Read]]
    ) -> tuple[NDArray[np.int64], list[_Read]]:
        started = time.perf_counter()
        reads = [future.result() for future in futures]
        self._seconds += time.perf_counter() - started  # nothing, where reading is faster than training
        for read in reads:
            self.broken.add(read.broken)
        return indices, reads

    def _read(self, index: int, words: NDArray[np.uint32], *, by_gpu: bool = True) -> _Read:
        size = self.dataset.size
        as_it_is = Resizing((0, 0, size, size), size, size)
        found: list[tuple[Tensor, Resizing, int]] = []

        def read(tried: int) -> None:
            encoded = self.dataset.store.read(tried) if by_gpu else None
            if encoded is not None:
                picture = open_image(encoded)
                count = picture.width * picture.height
                if picture.plain_jpeg and count <= _MOST_PIXELS:
                    plan = self._plan(picture.width, picture.height, words)
                    found.append((torch.frombuffer(bytearray(encoded), dtype=torch.uint8), plan, count))
                    return
            pixels = torch.empty(3, size, size, dtype=torch.uint8)
            self.dataset.decode(words, pixels, tried)
            found.append((pixels, as_it_is, size * size))

        broken: list[Broken] = []
        label = self.dataset.readable(index, read, broken)
        if label is None:
            grey = self.dataset.grey.expand(3, size, size).contiguous()
            return _Read(grey, as_it_is, size * size, int(self.dataset.labels[index]), tuple(broken))
        return _Read(*found[-1], label, tuple(broken))

    def _plan(self, width: int, height: int, words: NDArray[np.uint32]) -> Resizing:
        size = self.dataset.size
        if self.dataset.crops:
            return Resizing(random_crop_box(width, height, words), size, size)
        box = evaluation_box(width, height)
        resized = evaluation_size(box[2] - box[0], box[3] - box[1], size, self.dataset.margin)
        return Resizing(box, *resized, (resized[0] - size) // 2, (resized[1] - size) // 2)

    def _on_device(self, indices: NDArray[np.int64], reads: list[_Read], epoch: int) -> tuple[Tensor, ...]:
        started = time.perf_counter()
        words = self.dataset.augment.draw(indices, seed=self.seed, epoch=epoch)
        size = self.dataset.size
        pixels = torch.empty(len(reads), 3, size, size, dtype=torch.uint8, device=self._device)
        for chunk in _chunks([read.pixels for read in reads]):
            images, reads[chunk] = self._decoded(indices[chunk], words[chunk], reads[chunk])
            pixels[chunk] = resize_windows(images, [read.plan for read in reads[chunk]], size)
        labels = torch.tensor([read.label for read in reads]).to(self._device, non_blocking=True)
        augmented = self.dataset.augmented(PixelBatch(pixels, labels, indices), seed=self.seed, epoch=epoch)
        self._images += len(reads)
        self._seconds += time.perf_counter() - started
        return self.dataset.normalised(augmented), labels

    def _decoded(
        self, indices: NDArray[np.int64], words: NDArray[np.uint32], reads: list[_Read]
    ) -> tuple[list[Tensor], list[_Read]]:
        """The images on the device, and what was read of each; that changes where the GPU's decoder fails."""
        encoded = [b for b, read in enumerate(reads) if read.source.ndim == 1]
        decoded: dict[int, Tensor] = {}
        if encoded:
            try:
                decoded = dict(zip(encoded, self._decode([reads[b].source for b in encoded]), strict=True))
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except RuntimeError as error:  # one that the decoder does not like spoils them all
                if not self._warned:
                    reason = " ".join(str(error).split())
                    warn(f"the GPU does not decode some images ({reason}); those batches the CPU decodes")
                    self._warned = True
                reads = [
                    read if read.source.ndim == 3 else self._again(int(indices[b]), words[b])
                    for b, read in enumerate(reads)
                ]
        images = [
            decoded[b] if b in decoded else read.source.to(self._device, non_blocking=True)
            for b, read in enumerate(reads)
        ]
        return images, reads

    def _again(self, index: int, words: NDArray[np.uint32]) -> _Read:
        again = self._read(index, words, by_gpu=False)
        self.broken.add(again.broken)
        return again


def _chunks(pixels: list[int]) -> Iterator[slice]:
    """Slices of a batch, each of images with so many pixels that their decoded forms together fit in memory."""
    first = total = 0
    for b, count in enumerate(pixels):
        if total + count > _PIXELS_AT_A_TIME and b > first:
            yield slice(first, b)
            first, total = b, 0
        total += count
    if first < len(pixels):
        yield slice(first, len(pixels))
