"""Batches of image files that the GPU itself decodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from shike_fast.data.loaders.loader import Batch, EpochLoader, Request, joined
from shike_fast.data.loaders.prefetch import Prefetcher
from shike_fast.data.sampling import Sampler
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


@dataclass(frozen=True)
class _View:
    """A batch as one view sees it.

    Attributes:
        source: the images with the view's augmentation.
        request: which of them, and what their random words depend on.
        words: those words, uint32 [B, words].
        reads: what was read of each image.
    """

    source: ImageDataset
    request: Request
    words: NDArray[np.uint32]
    reads: list[_Read] = field(default_factory=list)


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
        sampler, views: as for :class:`shike_fast.data.Loader`; views are of the very images of the data set, and each
            decodes them anew.

    Raises:
        NoHardwareDecoderError: there is no such decoder.
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
        seed: int | None = None,
        num_workers: int = 4,
        report: Callable[[str], None] = warn,
        decode: DecodeBatch | None = None,
        rank: int = 0,
        world_size: int = 1,
        sampler: Sampler | None = None,
        views: Sequence[ImageDataset] = (),
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            sampler=sampler,
            views=views,
        )
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
                yield from self._prefetch(partial(self._on_device, read) for read in reads)
            finally:
                pool.shutdown(cancel_futures=True)

    def _reads(self, pool: ThreadPoolExecutor, epoch: int, start_batch: int) -> Iterator[list[_View]]:
        """The images of each batch, in each view, while the files of the next ones are being read."""
        ahead: deque[list[tuple[_View, list[Future[_Read]]]]] = deque()
        for request in self._requests(epoch, start_batch):
            ahead.append([self._begun(pool, number, request) for number in range(len(self.views))])
            if len(ahead) > _BATCHES_AHEAD:
                yield self._collected(ahead.popleft())
        while ahead:
            yield self._collected(ahead.popleft())

    def _begun(self, pool: ThreadPoolExecutor, number: int, request: Request) -> tuple[_View, list[Future[_Read]]]:
        source, request = self.views[number], request.of_view(number, len(self.views))
        words = source.augment.draw(request.indices, **request.draw)
        read = partial(self._read, source)
        futures = [pool.submit(read, int(i), words[b]) for b, i in enumerate(request.indices)]
        return _View(source, request, words), futures

    def _collected(self, begun: list[tuple[_View, list[Future[_Read]]]]) -> list[_View]:
        started = time.perf_counter()
        views = [replace(view, reads=[future.result() for future in futures]) for view, futures in begun]
        self._seconds += time.perf_counter() - started  # nothing, where reading is faster than training
        for view in views:
            for read in view.reads:
                self.broken.add(read.broken)
        return views

    def _read(self, source: ImageDataset, index: int, words: NDArray[np.uint32], *, by_gpu: bool = True) -> _Read:
        size = source.size
        as_it_is = Resizing((0, 0, size, size), size, size)
        found: list[tuple[Tensor, Resizing, int]] = []

        def read(tried: int) -> None:
            encoded = source.store.read(tried) if by_gpu else None
            if encoded is not None:
                picture = open_image(encoded)
                count = picture.width * picture.height
                if picture.plain_jpeg and count <= _MOST_PIXELS:
                    plan = _plan(source, picture.width, picture.height, words)
                    found.append((torch.frombuffer(bytearray(encoded), dtype=torch.uint8), plan, count))
                    return
            pixels = torch.empty(3, size, size, dtype=torch.uint8)
            source.decode(words, pixels, tried)
            found.append((pixels, as_it_is, size * size))

        broken: list[Broken] = []
        label = source.readable(index, read, broken)
        if label is None:
            grey = source.grey.expand(3, size, size).contiguous()
            return _Read(grey, as_it_is, size * size, int(source.labels[index]), tuple(broken))
        return _Read(*found[-1], label, tuple(broken))

    def _on_device(self, views: list[_View]) -> Batch:
        started = time.perf_counter()
        augmented, labels = zip(*map(self._augmented, views), strict=True)
        self._images += len(views[0].reads)
        self._seconds += time.perf_counter() - started
        return self.dataset.normalised(joined(augmented)), labels[0]

    def _augmented(self, view: _View) -> Batch:
        """The pixels of a view, uint8 [B, 3, S, S], and their labels, int64 [B]."""
        source, request, reads = view.source, view.request, view.reads
        size = source.size
        pixels = torch.empty(len(reads), 3, size, size, dtype=torch.uint8, device=self._device)
        for chunk in _chunks([read.pixels for read in reads]):
            images, reads[chunk] = self._decoded(view, chunk)
            pixels[chunk] = resize_windows(images, [read.plan for read in reads[chunk]], size)
        labels = torch.tensor([read.label for read in reads]).to(self._device, non_blocking=True)
        batch = PixelBatch(pixels, labels, request.indices, request.repeats)
        return source.augmented(batch, seed=request.seed, epoch=request.epoch), labels

    def _decoded(self, view: _View, chunk: slice) -> tuple[list[Tensor], list[_Read]]:
        """Images on the device, and what was read of each; that changes where the GPU's decoder fails."""
        indices, words, reads = view.request.indices[chunk], view.words[chunk], view.reads[chunk]
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
                    read if read.source.ndim == 3 else self._again(view.source, int(indices[b]), words[b])
                    for b, read in enumerate(reads)
                ]
        images = [
            decoded[b] if b in decoded else read.source.to(self._device, non_blocking=True)
            for b, read in enumerate(reads)
        ]
        return images, reads

    def _again(self, source: ImageDataset, index: int, words: NDArray[np.uint32]) -> _Read:
        again = self._read(source, index, words, by_gpu=False)
        self.broken.add(again.broken)
        return again


def _plan(source: ImageDataset, width: int, height: int, words: NDArray[np.uint32]) -> Resizing:
    size = source.size
    if source.crops:
        return Resizing(random_crop_box(width, height, words), size, size)
    box = evaluation_box(width, height)
    resized = evaluation_size(box[2] - box[0], box[3] - box[1], size, source.margin)
    return Resizing(box, *resized, (resized[0] - size) // 2, (resized[1] - size) // 2)


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
