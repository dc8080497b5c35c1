"""What a data set is: its description, its samples, and the checks that all of them share."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.errors import DataError


@runtime_checkable
class BatchSource(Protocol):
    """Samples that a :class:`shike_fast.data.Loader` can load.

    Attributes:
        labels: int64 [N], the class of every sample.
        seed: the seed of its augmentation where the caller names no other.
        wants_workers: decoding or augmenting its samples takes so long that worker processes pay off.
    """

    labels: NDArray[np.int64]
    seed: int

    @property
    def wants_workers(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample ``index`` as it looks in epoch 0: a normalised float32 image [C, H, W] and its label."""
        ...

    def batch(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W] and int64 labels [B].

        A row depends on (seed, epoch, index, repeat) alone.

        Args:
            indices: int64 [B].
            seed, epoch: what all rows share.
            repeats: int64 [B], how many times the epoch has shown each sample before; None, or not given: never. A
                source may lack it where no sampler draws a sample twice and a method sees one view of it.
        """
        ...


@dataclass(frozen=True)
class ValidationSplit:
    """Images that were set aside from a training set that comes without others to test on.

    Attributes:
        share: of each class.
        seed: of the choice.
        names: what the files of these images are called, below the data folder, in the order of the test set.
        whole: images before the split.
    """

    share: float
    seed: int
    names: tuple[bytes, ...]
    whole: int

    @property
    def sentence(self) -> str:
        """What is said of it."""
        return (
            f"no validation images: {len(self.names):,} of {self.whole:,} images set aside "
            f"(--val-share {self.share:g} of each class, --split-seed {self.seed})"
        )


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
        info: the description that it was loaded by; None where the loading function gave none.
        validation: the test images are a part that was set aside; None where the data set has its own.
        notes: sentences on what was found and done, for the head of a run.
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
    info: "DatasetInfo | None" = None
    validation: ValidationSplit | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Counts:
    """The size of a data set as its publishers state it.

    Attributes:
        classes: number of classes.
        images: images of each split: "train", "test" and perhaps "val".
        kind: who states it, "published" or "generated".
    """

    classes: int
    images: Mapping[str, int]
    kind: str = "published"


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is loaded.

    Attributes:
        name: its name on the command line.
        description: one line.
        how_obtained: one line: where its files come from.
        default_imbalance_factor: of its long-tail subset; None: the set is used as it is.
        augmentations: the training augmentations it accepts; the first is the default.
        resizable: accepts ``image_size``.
        downloadable: ``download=True`` can fetch it.
        counts: what its lists must hold; None: any number of images and classes.
        recipe: training settings by name (see :mod:`shike_fast.data.recipes`); what it leaves out has the defaults of
            the commands. Without any, :func:`shike_fast.data.register_dataset` chooses one.
        options: a dataclass whose fields are options that only this data set has, each declared by
            :func:`shike_fast.data.option`: flags of the commands, keywords of :func:`shike_fast.data.load_dataset`.
    """

    name: str
    description: str
    how_obtained: str
    default_imbalance_factor: float | None
    augmentations: tuple[str, ...]
    resizable: bool = False
    downloadable: bool = False
    counts: Counts | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    options: type | None = None


@dataclass(frozen=True)
class LoadOptions:
    """The checked arguments of :func:`shike_fast.data.load_dataset`, as a data set's loading function gets them.

    Those that only the data set has are ``own``, of the type ``DatasetInfo.options``.
    """

    data_dir: Path | None
    imbalance_factor: float | None
    augmentation: str
    download: bool
    verify: bool
    seed: int
    image_size: int | None
    strict: bool = False
    subset: str = "first"
    long_tail: str = "exp"
    own: Any = None


def require_data_dir(info: DatasetInfo, options: LoadOptions) -> Path:
    """``options.data_dir``, or DataError where the data set cannot be loaded without one."""
    if options.data_dir is None:
        raise DataError(f"{info.name}: needs --data-dir; {info.how_obtained}")
    return options.data_dir


MOST_PIXELS_A_SIDE = 4096  # of an image as the network sees it


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
