"""What every data set provides, and the registry that ``load_dataset`` looks names up in."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.longtail import check_imbalance_factor, check_subset
from shike_fast.data.random import check_seed
from shike_fast.errors import DataError


@runtime_checkable
class BatchSource(Protocol):
    """Samples that a :class:`shike_fast.data.Loader` can load.

    Attributes:
        labels: int64 [N], the class of every sample.
        seed: the seed of its augmentation where the caller names no other.
        one_by_one: its samples are decoded or augmented one after the other, so that worker processes pay off.
    """

    labels: NDArray[np.int64]
    seed: int

    @property
    def one_by_one(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample ``index`` as it looks in epoch 0: a normalised float32 image [C, H, W] and its label."""
        ...

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W] and int64 labels [B]; a row depends on (seed, epoch, index) alone."""
        ...


@dataclass(frozen=True)
class LongTailData:
    """A long-tailed training set and its test set.

    Attributes:
        name: the name it was loaded by.
        train, test: samples; ``set[i]`` is (float32 [C, H, W] normalised, int label), ``set.labels`` int64 [N].
        class_names: one name a class, in class-id order.
        class_counts: int64 [C], training images of each class.
        in_channels, image_size: shape of a sample, [in_channels, image_size, image_size].
        mean, std: normalisation of each channel, for pixels in [0, 1].
        imbalance_factor: the factor of the subset, None where the whole set is used.
        augmentation: name of the training augmentation.
        fingerprint: hash that identifies this training set (its labels, and its pixels or the names of its files).
    """

    name: str
    train: BatchSource
    test: BatchSource
    class_names: tuple[str, ...]
    class_counts: Tensor
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    imbalance_factor: float | None
    augmentation: str
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class DatasetInfo:
    """What can be said of a data set before it is loaded.

    Attributes:
        name: its name on the command line.
        description: one line.
        how_obtained: one line: where its files come from.
        default_imbalance_factor: None: the set is used as it is.
        augmentations: the training augmentations it accepts; the first is the default.
        resizable: accepts ``image_size``.
        downloadable: ``download=True`` can fetch it.
    """

    name: str
    description: str
    how_obtained: str
    default_imbalance_factor: float | None
    augmentations: tuple[str, ...]
    resizable: bool = False
    downloadable: bool = False


@dataclass(frozen=True)
class LoadOptions:
    """The checked arguments of :func:`load_dataset`, as a data set's loading function receives them."""

    data_dir: Path | None
    imbalance_factor: float | None
    augmentation: str
    download: bool
    verify: bool
    seed: int
    image_size: int | None
    strict: bool = False
    subset: str = "first"


def require_data_dir(info: DatasetInfo, options: LoadOptions) -> Path:
    """``options.data_dir``, or DataError where the data set cannot be loaded without one."""
    if options.data_dir is None:
        raise DataError(f"{info.name}: needs --data-dir; {info.how_obtained}")
    return options.data_dir


MOST_PIXELS_A_SIDE = 4096  # of an image as the network sees it

LoadFunction = Callable[[DatasetInfo, LoadOptions], LongTailData]

_REGISTRY: dict[str, tuple[DatasetInfo, LoadFunction]] = {}


def register_dataset(info: DatasetInfo) -> Callable[[LoadFunction], LoadFunction]:
    """Decorate the function that loads the data set described by ``info``."""

    def register(load: LoadFunction) -> LoadFunction:
        if info.name in _REGISTRY:
            raise ValueError(f"register_dataset: {info.name!r} is registered already")
        _REGISTRY[info.name] = (info, load)
        return load

    return register


def datasets() -> dict[str, DatasetInfo]:
    """All data sets by name."""
    return {name: info for name, (info, _) in _REGISTRY.items()}


def load_dataset(
    name: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    imbalance_factor: float | None = None,
    augmentation: str | None = None,
    image_size: int | None = None,
    download: bool = False,
    verify: bool = True,
    seed: int = 0,
    strict: bool = False,
    subset: str = "first",
) -> LongTailData:
    """Load a long-tailed data set.

    Args:
        name: one of :func:`datasets`.
        data_dir: folder with its files, or a pack of it; None for the place where the system's package puts them.
        imbalance_factor: IF of the long-tail subset, n_c = int(M · (1/IF)^(c/(C−1))); None for the data set's default.
        augmentation: training augmentation; None for the data set's default.
        image_size: side of the images in pixels, for data sets of image files (default 224).
        download: fetch missing files into ``data_dir`` (data sets that say so in :func:`datasets`).
        verify: check archive checksums and the exact number of records. Labels and formats are checked always.
        seed: seed of the augmentation, unless a loader names its own.
        strict: raise DataError at the first image file that cannot be read, where another one would replace it.
        subset: which images of a class the long-tail subset holds, a key of ``shike_fast.data.longtail.SUBSETS``.

    Returns:
        The training set, the test set and what describes them.

    Raises:
        DataError: an unknown name, an unusable argument, or files that are missing, incomplete or corrupt.
    """
    if name not in _REGISTRY:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(_REGISTRY)}")
    info, load = _REGISTRY[name]
    if augmentation is None:
        augmentation = info.augmentations[0]
    if augmentation not in info.augmentations:
        raise DataError(f"{name}: unknown augmentation {augmentation!r}; choose one of {', '.join(info.augmentations)}")
    if image_size is not None and not info.resizable:
        raise DataError(f"{name}: image_size cannot be chosen, this data set has images of one size")
    if image_size is not None and not 1 <= image_size <= MOST_PIXELS_A_SIDE:
        raise DataError(f"{name}: image_size must be from 1 to {MOST_PIXELS_A_SIDE}, got {image_size}")
    if download and not info.downloadable:
        raise DataError(f"{name}: cannot be downloaded by this program; {info.how_obtained}")
    # A folder that is still to be downloaded into need not exist yet.
    if data_dir is not None and not download and not Path(data_dir).is_dir():
        raise DataError(f"{name}: --data-dir {data_dir} is not a folder; {info.how_obtained}")
    if imbalance_factor is None:
        imbalance_factor = info.default_imbalance_factor
    if check_subset(subset) != "first" and imbalance_factor is None:
        raise DataError(f"{name}: subset {subset!r} needs an imbalance factor, this data set is used whole")
    try:
        check_seed(seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    options = LoadOptions(
        data_dir=None if data_dir is None else Path(data_dir),
        imbalance_factor=None if imbalance_factor is None else check_imbalance_factor(imbalance_factor),
        augmentation=augmentation,
        download=download,
        verify=verify,
        seed=seed,
        image_size=image_size,
        strict=strict,
        subset=subset,
    )
    from shike_fast.data.pack import reader as pack  # which needs what is defined here

    if options.data_dir is not None and pack.is_pack(options.data_dir):
        return pack.load_pack(info, options, options.data_dir)
    return load(info, options)


def check_labels(labels: NDArray[np.int64], num_classes: int, source: str) -> None:
    """Raise DataError, naming ``source`` and the first offender, unless all labels lie in 0 … num_classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{source}: label {labels[wrong[0]]} of record {wrong[0]} is outside 0 … {num_classes - 1}; "
            "the file is corrupt, obtain it again"
        )


def count_classes(labels: NDArray[np.int64], num_classes: int) -> Tensor:
    """int64 [num_classes], the number of samples of each class."""
    return torch.from_numpy(np.bincount(labels, minlength=num_classes).astype(np.int64))


def fingerprint(*parts: bytes | NDArray[np.generic]) -> str:
    """SHA-256 of byte strings and arrays (their types, shapes and contents), as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(f"bytes{len(part)}".encode())
            digest.update(part)
    return digest.hexdigest()
