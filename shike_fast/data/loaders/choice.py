"""Which loader a data set gets."""

from __future__ import annotations

from typing import Any

import torch

from shike_fast.data.loaders.device import DeviceLoader
from shike_fast.data.loaders.gpu import GpuPhotoLoader
from shike_fast.data.loaders.loader import EpochLoader, Loader
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.data.types import BatchSource

_LOADERS: dict[str, type[EpochLoader]] = {
    "batches": Loader,
    "device": DeviceLoader,
    "files": PhotoLoader,
    "files on GPU": GpuPhotoLoader,
}


def loader_class(dataset: BatchSource, wanted: str) -> type[EpochLoader] | None:
    """The loader that ``wanted`` (``auto``, ``cpu``, ``gpu`` or ``device``) means for a data set; None: it has none.

    A data set says so in a mapping ``loaders``; one that has no such mapping loads itself, batch by batch.
    """
    loaders = getattr(dataset, "loaders", None)
    if loaders is None:
        return Loader
    return _LOADERS[loaders[wanted]] if wanted in loaders else None


def make_loader(
    dataset: BatchSource, kind: type[EpochLoader], *, device: torch.device, num_workers: int, **settings: Any
) -> EpochLoader:
    """A loader of the class that :func:`loader_class` chose.

    Args:
        dataset: the samples.
        kind: the class.
        device: where training is.
        num_workers: worker processes, or threads that read for the GPU; none where the images are on the device.
        settings: batch_size, shuffle, seed, rank, world_size.

    Raises:
        NoHardwareDecoderError: the GPU cannot decode.
        ValueError: an argument out of range, or a shuffled epoch whose last batch has less than one sample a process.
    """
    if kind is Loader:
        return Loader(dataset, num_workers=num_workers, pin_memory=device.type == "cuda", **settings)
    settings["device"] = device
    if kind is not DeviceLoader:
        settings["num_workers"] = num_workers
    return kind(dataset, **settings)
