"""Data sets that fit in memory, as one uint8 array."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from shike_fast.data.augment.small import AUGMENTATIONS, Normalise
from shike_fast.data.longtail import long_tail_indices
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, count_classes, fingerprint
from shike_fast.errors import DataError


class ArrayDataset(Dataset[tuple[Tensor, int]]):
    """Images in memory, gathered, augmented and normalised a batch at a time.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        augmentation: a key of :data:`shike_fast.data.augment.small.AUGMENTATIONS`.
        seed: seed of the augmentation where the caller names no other.
        augment: that augmentation.
        normalise: what follows it.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: str = "none",
        seed: int = 0,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                "ArrayDataset: expected images uint8 [N, C, H, W] and labels int64 [N], "
                f"got {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
            )
        self.images = images
        self.labels = labels
        self.augmentation = augmentation
        self.seed = seed
        self.augment = AUGMENTATIONS[augmentation]
        self.normalise = Normalise(mean, std)

    @property
    def one_by_one(self) -> bool:
        """Whether worker processes pay off: the augmentation handles each image in turn."""
        return self.augment.one_by_one

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(np.array([range(len(self))[index]]), seed=self.seed, epoch=0)
        return images[0], int(labels[0])

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W] and int64 labels [B]; a row depends on (seed, epoch, index) alone."""
        words = self.augment.draw(indices, seed=seed, epoch=epoch)
        return self.augment(self.images[indices], words, self.normalise), torch.from_numpy(self.labels[indices])


def build(
    info: DatasetInfo,
    options: LoadOptions,
    *,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> LongTailData:
    """Take the long-tail subset of ``train`` and wrap both parts.

    Images are uint8 [N, C, H, W], labels int64 [N] and known to be in range.
    """
    for part, (_, labels) in (("training", train), ("test", test)):
        if len(labels) == 0:
            raise DataError(f"{info.name}: there are no {part} images; {info.how_obtained}")
    images, labels = train
    if options.imbalance_factor is not None:
        kept = long_tail_indices(labels, len(class_names), options.imbalance_factor, options.subset)
        images, labels = images[kept], labels[kept]
    _, channels, side, _ = images.shape
    return LongTailData(
        name=info.name,
        train=ArrayDataset(images, labels, mean=mean, std=std, augmentation=options.augmentation, seed=options.seed),
        test=ArrayDataset(*test, mean=mean, std=std),
        class_names=class_names,
        class_counts=count_classes(labels, len(class_names)),
        in_channels=channels,
        image_size=side,
        mean=mean,
        std=std,
        imbalance_factor=options.imbalance_factor,
        augmentation=options.augmentation,
        fingerprint=fingerprint(images, labels),
    )
