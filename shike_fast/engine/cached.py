"""``--cache-features``: what the frozen part of a network makes of each image, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shike_fast import data, models
from shike_fast._util.resources import free_memory
from shike_fast.data.loaders.loader import Batch, EpochLoader, joined, shard
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.distributed import Processes, local_world_size
from shike_fast.engine.finetuning import ALL
from shike_fast.engine.setup import make_loader
from shike_fast.engine.state import memory_format
from shike_fast.errors import ConfigError

_MOST = 0.8  # share of the free memory: training needs some, too
_EXCHANGED = 2**28  # bytes at a time
_GIB = 2**30


class FeatureCache:
    """What the frozen part makes of the training images and, after them, the test images, on the device.

    It is the maps of the trunk that branches and fusions take, or, where the branches are frozen as well, the pooled
    features. An epoch hands over the places of images in here, int64 [B, 1, 1, 1], in place of images.

    Args:
        model: the network, on its device and in its layout, frozen.
        config, dataset, device: of the run.
        loaders: of the run, for training and test.
        processes: each computes its share of the images; all get all of them.
        autocast: makes the context around each forward pass.

    Attributes:
        train_loader, test_loader: what takes the place of ``loaders``.
        bytes: that it takes.
        note: a line on its size.

    Raises:
        ConfigError: the memory that is free does not suffice.
    """

    def __init__(
        self,
        model: models.MultiExpertNetwork,
        config: TrainConfig,
        dataset: data.LongTailData,
        device: torch.device,
        *,
        loaders: tuple[EpochLoader, EpochLoader],
        processes: Processes,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.pooled = config.freeze == ALL
        self._model, self._autocast, self._device = model, autocast, device
        first = len(dataset.train)
        images = first + len(dataset.test)
        self._layout = memory_format(config)
        found = self._compute(torch.zeros(2, dataset.in_channels, dataset.image_size, dataset.image_size))
        self.bytes = images * sum(tensor[0].numel() * tensor.element_size() for tensor in found.values())
        self.note = f"the features of {images:,} images are computed once and kept: {self.bytes / _GIB:.3g} GiB"
        processes.run_on_all(lambda: self._require_memory(images))
        # channels-last maps have their channels last in here
        self._channels_last = {name: _is_channels_last(tensor) for name, tensor in found.items()}
        self._rows = {
            name: tensor.new_zeros(images, *self._stored(name, tensor).shape[1:]) for name, tensor in found.items()
        }
        self.labels = torch.zeros(images, dtype=torch.int64)
        for source, start, batch_size in (
            (dataset.train, 0, config.batch_size),
            (dataset.test, first, loaders[1].batch_size),
        ):
            as_tested = dataclasses.replace(dataset, test=source)
            loader = make_loader(
                config, as_tested, device, train=False, test_batch_size=batch_size, processes=processes
            )
            try:
                processes.run_on_all(lambda loader=loader, start=start: self._fill(loader, start))  # type: ignore[misc]
            finally:
                loader.close()
        if processes.is_distributed:
            self._exchange()
        self.train_loader = _IndexLoader(loaders[0].dataset, loaders[0], self.labels, 0)
        self.test_loader = _IndexLoader(loaders[1].dataset, loaders[1], self.labels, first)

    def network(self, model: nn.Module) -> CachedNetwork:
        """The network as it works with what is in here.

        Raises:
            ConfigError: it is not one with the frozen part.
        """
        if not isinstance(model, models.MultiExpertNetwork) or model.frozen != self._model.frozen:
            raise ConfigError(
                f"--cache-features: the method tests a {type(model).__name__} in place of the network, which has no "
                "frozen part; leave --cache-features out"
            )
        return CachedNetwork(model, self)

    def training_in_order(self) -> EpochLoader:
        """A loader of this process's share of the training images as they are in here, as if they were test images."""
        return _IndexLoader(self.train_loader.dataset, self.test_loader, self.labels, 0)

    def at(self, indices: Tensor) -> dict[str, Tensor]:
        """What is in here at places int64 [B, 1, 1, 1]: the trunk's maps, or ``features`` [B, K, D]."""
        found = {name: rows.index_select(0, indices.flatten()) for name, rows in self._rows.items()}
        return {name: one.permute(0, 3, 1, 2) if self._channels_last[name] else one for name, one in found.items()}

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1) if self._channels_last[name] else tensor

    @torch.no_grad()
    def _compute(self, images: Tensor) -> dict[str, Tensor]:
        images = images.to(self._device, non_blocking=True, memory_format=self._layout)
        was_training = self._model.training
        self._model.eval()
        try:
            with self._autocast():
                if self.pooled:
                    return {"features": self._model.features(images).transpose(0, 1)}
                return self._model.needed_maps(self._model.feature_maps(images))
        finally:
            self._model.train(was_training)

    def _fill(self, loader: EpochLoader, start: int) -> None:
        """Compute this process's share of the loader's images, whose places begin at ``start``."""
        size, count = loader.batch_size, len(loader.dataset)
        shares = (
            shard(np.arange(first, min(first + size, count)), loader.rank, loader.world_size)
            for first in range(0, count, size)
        )
        mine = (torch.from_numpy(share + start) for share in shares if len(share))
        for places, (images, labels) in zip(mine, loader.epoch(0), strict=True):
            for name, tensor in self._compute(images).items():
                self._rows[name][places.to(self._device)] = self._stored(name, tensor)
            self.labels[places] = labels.cpu()

    def _exchange(self) -> None:
        """Give every process what the others have computed: where it has zeros, they have a value."""
        on_device = self.labels.to(self._device)
        for tensor in (on_device, *self._rows.values()):
            for part in tensor.view(-1).view(torch.uint8).split(_EXCHANGED):
                dist.all_reduce(part)
        self.labels = on_device.cpu()

    def _require_memory(self, images: int) -> None:
        free = free_memory(self._device)
        if self._device.type == "cpu":
            free //= local_world_size()  # each process keeps all of them
        if self.bytes > _MOST * free:
            remedy = "leave it out" if self.pooled else f"use --freeze {ALL}, whose features are small, or leave it out"
            raise ConfigError(
                f"--cache-features: the features of {images:,} images take {self.bytes / _GIB:.3g} GiB, of "
                f"{free / _GIB:.3g} GiB that are free at most {_MOST:.0%} may be taken; {remedy}"
            )


class CachedNetwork(nn.Module):
    """A network whose frozen part is looked up: places of images, int64 [B, 1, 1, 1] -> what the network returns."""

    def __init__(self, model: models.MultiExpertNetwork, cache: FeatureCache) -> None:
        super().__init__()
        self.model = model
        self._cache = cache

    def forward(self, indices: Tensor, stage: int = 1) -> Tensor:
        return self.classify(self.features(indices), stage)

    def features(self, indices: Tensor) -> Tensor:
        """Pooled features [K, B, D]."""
        found = self._cache.at(indices)
        if self._cache.pooled:
            return found["features"].transpose(0, 1).contiguous()
        return self.model.expert_features(found)

    def classify(self, features: Tensor, stage: int = 1) -> Tensor:
        """As of the network."""
        return self.model.classify(features, stage)


class _IndexLoader(EpochLoader):
    """Batches such as another loader's, with places in a cache, from ``first`` on, for images."""

    def __init__(self, dataset: data.BatchSource, like: EpochLoader, labels: Tensor, first: int) -> None:
        super().__init__(
            dataset,
            batch_size=like.batch_size,
            shuffle=like.shuffle,
            seed=like.seed,
            rank=like.rank,
            world_size=like.world_size,
            sampler=like.sampler,
            views=like.views,
        )
        self._labels = labels
        self._first = first

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        for request in self._requests(epoch, start_batch):
            places = torch.from_numpy(request.indices + self._first)
            yield joined([places.view(-1, 1, 1, 1)] * len(self.views)), self._labels[places]


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
