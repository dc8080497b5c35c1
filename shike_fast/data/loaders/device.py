"""Batches of a data set that lives on the training device and is augmented there."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch

from shike_fast.data.augment.batched import to_device
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.data.loaders.loader import Batch, EpochLoader, Request, joined
from shike_fast.data.sampling import Sampler

# Bytes of uint8 images augmented at a time, by default. A CPU should find the intermediate results in its caches.
# A GPU wants few, large launches; while it works it needs about five times as much memory.
_AHEAD_BYTES = {"cpu": 3 * 2**20, "cuda": 2**25}


class DeviceLoader(EpochLoader):
    """:class:`shike_fast.data.Loader` for images that fit in the memory of the training device: the same batches.

    The whole set moves to the device once, as uint8. There the images of some batches are gathered and augmented at a
    time; each batch is normalised when it is its turn. Batches are (images float32 [B, C, H, W] channels-last, labels
    int64 [B]) on the device, in memory of their own. On a GPU no step waits for it.

    Args:
        dataset: the samples.
        batch_size: B, over all processes.
        shuffle: draw a new order every epoch, else file order.
        device: where the images are kept and augmented.
        seed: of order and augmentation; None takes the data set's.
        rank, world_size: this process and the number of processes that train together; each loads its shard of every
            batch. Without shuffling, a last batch smaller than their number is left out where the shard is empty.
        sampler, views: as for :class:`shike_fast.data.Loader`; views are of the very images of the data set.
        ahead: batches augmented at a time, which changes no result. None takes what makes 3 MiB of images on a CPU,
            1024 of CIFAR (with fewer, much of the time goes into the calls; with many more, into memory), and elsewhere
            32 MiB, an epoch of CIFAR-100-LT: a GPU starts the same few hundred kernels for a batch as for an epoch.

    Raises:
        ValueError: an argument out of range, or a shuffled epoch whose last batch has less than one sample a process.
    """

    dataset: ArrayDataset
    views: tuple[ArrayDataset, ...]

    def __init__(
        self,
        dataset: ArrayDataset,
        *,
        batch_size: int,
        shuffle: bool,
        device: torch.device | str,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        sampler: Sampler | None = None,
        views: Sequence[ArrayDataset] = (),
        ahead: int | None = None,
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
        if ahead is not None and ahead < 1:
            raise ValueError(f"DeviceLoader: ahead must be at least 1, got {ahead}")
        self._device = torch.device(device)
        if ahead is None:
            shard_bytes = len(self.views) * math.prod(dataset.shape) * max(1, batch_size // world_size)
            ahead = max(1, _AHEAD_BYTES.get(self._device.type, _AHEAD_BYTES["cuda"]) // max(1, shard_bytes))
        self._ahead = ahead
        self._augmentations = [view.augmentation_on(self._device) for view in self.views]
        self._images, self._labels = (
            torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self._device)
            for array in (dataset.images, dataset.labels)
        )

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        requests = self._requests(epoch, start_batch)
        for first in range(0, len(requests), self._ahead):
            yield from self._augmented(requests[first : first + self._ahead])

    def _augmented(self, requests: list[Request]) -> Iterator[Batch]:
        first = requests[0]
        indices = np.concatenate([request.indices for request in requests])
        repeats = [request.repeats for request in requests if request.repeats is not None]
        whole = Request(indices, first.seed, first.epoch, np.concatenate(repeats) if repeats else None)
        seen = [whole.of_view(number, len(self.views)) for number in range(len(self.views))]
        plans = [
            augmentation.plan(view.augment.draw(indices, **request.draw))
            for augmentation, view, request in zip(self._augmentations, self.views, seen, strict=True)
        ]
        (rows,), *moved = to_device([[indices], *chain.from_iterable(plans)], self._device)
        parts = iter(moved)
        sizes = [len(request.indices) for request in requests]
        pixels = [
            augmentation.augment(self._images.index_select(0, rows), list(islice(parts, len(plan)))).split(sizes)
            for augmentation, plan in zip(self._augmentations, plans, strict=True)
        ]
        for some, of_rows in zip(zip(*pixels, strict=True), rows.split(sizes), strict=True):
            yield self._augmentations[0].normalise(joined(some)), self._labels.index_select(0, of_rows)
