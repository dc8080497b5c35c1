"""Batches of an epoch, in this process or from worker processes, resumable at any batch."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shike_fast.data._random import check_seed, permutation
from shike_fast.data.base import BatchSource
from shike_fast.errors import DataError, RunError

Batch = tuple[Tensor, Tensor]

_DEATH_SECONDS = 1.0


@dataclass(frozen=True)
class _Request:
    """One batch to load: everything a worker needs to know."""

    indices: NDArray[np.int64]
    seed: int
    epoch: int


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker, sent as a value: torch would add a traceback to a raised one's text."""

    message: str


class _WorkerDataset(Dataset[Batch]):
    """What the worker processes hold: answers whole-batch requests."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __getitems__(self, request: _Request) -> Batch | _Failure:
        try:
            return self.source.batch(request.indices, seed=request.seed, epoch=request.epoch)
        except DataError as error:
            return _Failure(str(error))


class _Requests:
    """The batch sampler of the worker pool: yields the requests of the epoch that was set last."""

    def __init__(self) -> None:
        self.pending: list[_Request] = []

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.pending)


def _identity(batch: Batch | _Failure) -> Batch | _Failure:
    return batch


# Ctrl-C and a batch system's SIGTERM reach the whole process group. The main process finishes its step, saves and
# closes the workers; a worker that died first would turn that clean exit into an error. Workers end without it, too.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _start_worker(_worker: int) -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _holding_stop_signals() -> Iterator[None]:
    """Delay the stop signals; processes forked meanwhile never see them, not even before :func:`_start_worker`."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class Epoch:
    """The batches of one epoch from ``start_batch`` on; ``len()`` is their number. Made by :meth:`Loader.epoch`."""

    def __init__(self, loader: "Loader", epoch: int, start_batch: int) -> None:
        self._loader = loader
        self._epoch = epoch
        self._start_batch = start_batch

    def __len__(self) -> int:
        return self._loader.batches_per_epoch - self._start_batch

    def __iter__(self) -> Iterator[Batch]:
        return self._loader._batches(self._epoch, self._start_batch)


class Loader:
    """Loads batches (images float32 [B, C, H, W] normalised, labels int64 [B]), the short last one included.

    The order of an epoch depends on (seed, epoch) alone and a sample on (seed, epoch, its index) alone: the number of
    workers and a resumption in the middle of an epoch change nothing.

    Args:
        dataset: the samples.
        batch_size: B.
        shuffle: draw a new order every epoch, else file order.
        seed: of order and augmentation; None takes the data set's.
        num_workers: worker processes, kept from epoch to epoch until :meth:`close`; 0 loads in this process.
        pin_memory: return page-locked tensors, for asynchronous copies to a GPU; without effect where there is none.

    Raises:
        ValueError: an argument out of range.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Loader: batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"Loader: num_workers must be at least 0, got {num_workers}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = check_seed(dataset.seed if seed is None else seed)
        self.num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._requests = _Requests()
        self._pool: DataLoader[Batch] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of a whole epoch, the short last one included."""
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Epoch:
        """The batches of an epoch, without the first ``start_batch`` (which are not loaded at all).

        Raises:
            ValueError: the epoch is negative or ``start_batch`` is not within the epoch.
        """
        if not 0 <= epoch < 2**32:
            raise ValueError(f"Loader: epoch must be from 0 to 2**32 - 1, got {epoch}")
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"Loader: start_batch must be from 0 to {self.batches_per_epoch}, got {start_batch}")
        return Epoch(self, epoch, start_batch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The sample indices of an epoch in the order in which they are loaded, int64 [N]."""
        return permutation(self.seed, epoch, len(self.dataset)) if self.shuffle else np.arange(len(self.dataset))

    def close(self) -> None:
        """End the worker processes. The loader may be used again: it then starts new ones."""
        if self._pool is not None:
            iterator = self._pool._iterator
            self._pool = None
            if iterator is not None:
                # There is no public way; left to the garbage collector, the workers would go on for a while.
                iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        order = self.order(epoch)
        starts = range(start_batch * self.batch_size, len(order), self.batch_size)
        requests = [_Request(order[s : s + self.batch_size], self.seed, epoch) for s in starts]
        return self._from_workers(requests) if self.num_workers else self._from_here(requests)

    def _from_here(self, requests: list[_Request]) -> Iterator[Batch]:
        for request in requests:
            images, labels = self.dataset.batch(request.indices, seed=request.seed, epoch=request.epoch)
            yield (images.pin_memory(), labels.pin_memory()) if self._pin_memory else (images, labels)

    def _from_workers(self, requests: list[_Request]) -> Iterator[Batch]:
        if self._pool is None:
            self._pool = DataLoader(
                _WorkerDataset(self.dataset),
                # PyTorch's types expect lists of indices and of samples; it passes on what it is given.
                batch_sampler=self._requests,  # type: ignore[arg-type]
                collate_fn=_identity,  # type: ignore[arg-type]
                num_workers=self.num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_start_worker,
                persistent_workers=True,
                generator=torch.Generator(),  # its own: iterating must not advance the global generator
            )
        self._requests.pending = requests
        for answer in self._answers(self._pool):
            if isinstance(answer, _Failure):
                raise DataError(answer.message)
            yield answer

    def _answers(self, pool: DataLoader[Batch]) -> Iterator[Batch | _Failure]:
        try:
            try:
                with _holding_stop_signals():
                    answers = iter(pool)
                yield from answers
            except (OSError, EOFError):
                # Fetching a batch that a dying worker has just announced fails like this. If so, the signal of its
                # death, on which PyTorch raises the RuntimeError below, interrupts this sleep.
                time.sleep(_DEATH_SECONDS)
                raise
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            self.close()
            reason = " ".join(str(error).split()).rstrip(".")
            raise RunError(f"{reason}; memory may have run out: use fewer --workers, or 0") from error
