"""Batches of an epoch, in this process or from worker processes, resumable at any batch."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from shike_fast.data.images.broken import BrokenImages
from shike_fast.data.loaders.workers import LoadingStopped, WorkerPool
from shike_fast.data.random import check_seed
from shike_fast.data.sampling import Instance, Sampler, count_repeats
from shike_fast.data.types import BatchSource

__all__ = ["Batch", "Epoch", "EpochLoader", "Loader", "LoadingStopped", "Request", "joined", "shard"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Request:
    """One batch to load: everything a worker needs to know.

    Attributes:
        indices: int64 [B], the samples.
        seed: of their augmentation.
        epoch: in which they are shown.
        repeats: int64 [B], how many times the epoch has shown each of them before; None: never.
    """

    indices: NDArray[np.int64]
    seed: int
    epoch: int
    repeats: NDArray[np.int64] | None = None

    @property
    def draw(self) -> dict[str, Any]:
        """What, besides the indices, a sample's random numbers depend on, as arguments of a data set."""
        draw = {"seed": self.seed, "epoch": self.epoch}
        return draw if self.repeats is None else draw | {"repeats": self.repeats}

    def of_view(self, view: int, views: int) -> "Request":
        """The batch as one of several views sees it: each of them is a showing that counts."""
        if views == 1:
            return self
        before = np.zeros_like(self.indices) if self.repeats is None else self.repeats
        return replace(self, repeats=before * views + view)


@dataclass(frozen=True)
class _LoadBatch:
    """Answers a request with the batches of all views, joined."""

    views: tuple[BatchSource, ...]

    def __call__(self, request: Request) -> Batch:
        requests = [request.of_view(number, len(self.views)) for number in range(len(self.views))]
        batches = [view.batch(r.indices, **r.draw) for view, r in zip(self.views, requests, strict=True)]
        return joined([images for images, _ in batches]), batches[0][1]


def joined(views: Sequence[Tensor]) -> Tensor:
    """V views [B, ...] of the same images as [V*B, ...], one view after the other."""
    return views[0] if len(views) == 1 else torch.cat(list(views))


def shard(indices: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Shard of a global batch that process ``rank`` of ``world_size`` takes; the first ranks have the odd samples."""
    return np.array_split(indices, world_size)[rank]


class Epoch:
    """The batches of one epoch from ``start_batch`` on; ``len()`` is their number. Made by ``loader.epoch(...)``."""

    def __init__(self, loader: "EpochLoader", epoch: int, start_batch: int) -> None:
        self._loader = loader
        self._epoch = epoch
        self._start_batch = start_batch

    def __len__(self) -> int:
        count, size = len(self._loader.dataset), self._loader.batch_size
        starts = range(self._start_batch * size, count, size)
        return sum(min(size, count - start) > self._loader.rank for start in starts)

    def __iter__(self) -> Iterator[Batch]:
        return self._loader._batches(self._epoch, self._start_batch)


class EpochLoader(ABC):
    """What all loaders have in common: the order of an epoch, its global batches and this process's shard of each.

    The order of an epoch depends on (seed, epoch) alone and a sample on (seed, epoch, its index, how often the epoch
    has shown it before) alone, so a resumption in the middle of an epoch and the number of processes change no sample.
    Several epochs may be under way at a time.

    With V views a batch has the images [V*B, C, H, W], view 0 of all B, then view 1, and so on, and the labels [B]. In
    view v a sample counts as shown V*r + v times before, where it was drawn r times before.

    Attributes:
        sampler: draws the images of a shuffled epoch. It may be replaced between epochs.
        views: what each view takes its samples from: sets of the same images.
        should_stop: called while the next batch is not ready; if it returns True, :class:`LoadingStopped` ends the
            epoch. By default it returns False.
        decodes: the loader decodes image files.
        broken: the images that could not be read so far; None where no files are read.
    """

    decodes: ClassVar[bool] = False
    broken: BrokenImages | None = None

    def __init__(
        self,
        dataset: BatchSource,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int | None,
        rank: int,
        world_size: int,
        sampler: Sampler | None,
        views: Sequence[BatchSource],
    ) -> None:
        name = type(self).__name__
        if batch_size < 1:
            raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}")
        if world_size < 1:
            raise ValueError(f"{name}: world_size must be at least 1, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"{name}: rank must be from 0 to {world_size - 1}, got {rank}")
        if shuffle and len(dataset) > 0:
            smallest = min(batch_size, (len(dataset) - 1) % batch_size + 1)
            if smallest < world_size:
                raise ValueError(
                    f"{name}: the last batch of {len(dataset)} samples in batches of {batch_size} holds {smallest}, "
                    f"too few for {world_size} processes; choose another batch size"
                )
        self.dataset = dataset
        self.views = tuple(views) or (dataset,)
        self.sampler = sampler or Instance(dataset.labels)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = check_seed(dataset.seed if seed is None else seed)
        self.rank = rank
        self.world_size = world_size
        self.should_stop: Callable[[], bool] = lambda: False

    @property
    def images_per_second(self) -> float | None:
        """What the loader could deliver if nothing made it wait; None where that is not measured."""
        return None

    @property
    def batches_per_epoch(self) -> int:
        """Number of global batches of a whole epoch, the short last one included."""
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Epoch:
        """The batches of an epoch, without the first ``start_batch`` (which are not loaded at all).

        Raises:
            ValueError: the epoch is negative or ``start_batch`` is not within the epoch.
        """
        name = type(self).__name__
        if not 0 <= epoch < 2**32:
            raise ValueError(f"{name}: epoch must be from 0 to 2**32 - 1, got {epoch}")
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"{name}: start_batch must be from 0 to {self.batches_per_epoch}, got {start_batch}")
        return Epoch(self, epoch, start_batch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The sample indices of an epoch in the order in which all processes load them, int64 [N]."""
        return self.sampler.order(self.seed, epoch) if self.shuffle else np.arange(len(self.dataset))

    def close(self) -> None:  # noqa: B027
        """Release what is kept from epoch to epoch. The loader may be used again."""

    @abstractmethod
    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]: ...

    def _requests(self, epoch: int, start_batch: int) -> list[Request]:
        """What this process loads for each batch, without batches at the end of which it has nothing."""
        order = self.order(epoch)
        repeats = count_repeats(order) if self.shuffle and self.sampler.repeats else None
        starts = range(start_batch * self.batch_size, len(order), self.batch_size)

        def share(values: NDArray[np.int64], start: int) -> NDArray[np.int64]:
            return shard(values[start : start + self.batch_size], self.rank, self.world_size)

        requests = [
            Request(share(order, s), self.seed, epoch, None if repeats is None else share(repeats, s)) for s in starts
        ]
        return [request for request in requests if len(request.indices)]


class Loader(EpochLoader):
    """Loads batches (images float32 [B, C, H, W] normalised, labels int64 [B]), the short last one included.

    The order of an epoch depends on (seed, epoch) alone and a sample on (seed, epoch, its index, how often the epoch
    has shown it before) alone: the number of workers and a resumption in the middle of an epoch change nothing.

    Args:
        dataset: the samples.
        batch_size: B, over all processes.
        shuffle: draw a new order every epoch, else file order.
        seed: of order and augmentation; None takes the data set's.
        num_workers: worker processes, kept from epoch to epoch until :meth:`close`; 0 loads in this process.
        pin_memory: return pinned tensors, for asynchronous copies to a GPU; without effect where there is none.
        rank, world_size: this process and the number of processes that train together; each loads its shard of every
            batch. Without shuffling, a last batch smaller than their number is left out where the shard is empty.
        sampler: draws a shuffled epoch; None shows every sample once.
        views: sets of the same samples, a view each: a batch holds the images [V*B, ...] of all of them, one view
            after the other, and the labels [B]. By default the data set is the only one.

    Raises:
        ValueError: an argument out of range, or a shuffled epoch whose last batch has less than one sample a process.
    """

    def __init__(
        self,
        dataset: BatchSource,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        sampler: Sampler | None = None,
        views: Sequence[BatchSource] = (),
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
        if num_workers < 0:
            raise ValueError(f"Loader: num_workers must be at least 0, got {num_workers}")
        self.num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._pool: WorkerPool | None = None
        self._end_workers: Callable[[], object] = lambda: None

    def close(self) -> None:
        """End the worker processes, and epochs that are under way with them. Another epoch starts new ones."""
        if self._pool is not None:
            self._pool = None
            self._end_workers()

    def _load_function(self) -> Callable[[Request], Any]:
        """What a worker does with a request. It goes to the workers: it must not refer to this loader."""
        return _LoadBatch(self.views)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        return self._loaded(epoch, start_batch)

    def _loaded(self, epoch: int, start_batch: int) -> Iterator[Any]:
        """What ``_load_function`` makes of this process's shard of each batch, pinned if that was asked for."""
        requests = self._requests(epoch, start_batch)
        if self.num_workers == 0:
            load = self._load_function()
            for request in requests:
                loaded = load(request)
                yield pin_memory(loaded) if self._pin_memory else loaded
        else:
            answers = self._from_workers(requests)
            yield from _pinned(answers) if self._pin_memory else answers

    def _from_workers(self, requests: list[Request]) -> Iterator[Any]:
        if self._pool is None or not self._pool.processes:
            self._pool = WorkerPool(self._load_function(), self.num_workers)
            # Also when the program ends: it would wait for ever for workers that ignore the signal which it sends them.
            self._end_workers = weakref.finalize(self, self._pool.close)
        yield from self._pool.answers(requests, self.should_stop)


def _pinned(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches in pinned memory; a thread copies each while the one before it is in use."""
    device = torch.cuda.current_device()  # a new thread would begin with the first one, and take memory there
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        waiting: Future[Any] | None = None
        for batch in batches:
            begun = thread.submit(pin_memory, batch)
            if waiting is not None:
                yield waiting.result()
            waiting = begun
        if waiting is not None:
            yield waiting.result()
