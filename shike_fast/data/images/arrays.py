"""Data sets that fit in memory, as one uint8 array."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.small import AUGMENTATIONS
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.data.longtail import long_tail_indices
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, count_classes, fingerprint
from shike_fast.errors import DataError

_CPU = torch.device("cpu")


class ArrayDataset(AugmentedDataset):
    """Images in memory, gathered, augmented and normalised a batch at a time.

    Attributes:
        images: uint8 [N, C, H, W].
    """

    augmentations = AUGMENTATIONS
    loaders: ClassVar = {"auto": "device", "device": "device", "gpu": "device", "cpu": "batches"}

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
        _, channels, height, width = images.shape
        super().__init__(labels, (channels, height, width), augmentation=augmentation, mean=mean, std=std, seed=seed)
        self.images = images

    @property
    def wants_workers(self) -> bool:
        return self.augment.slow

    def batch(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        words = self.augment.draw(indices, seed=seed, epoch=epoch, repeats=repeats)
        images = self.augmentation_on(_CPU)(torch.from_numpy(self.images[indices]), words)
        return images, torch.from_numpy(self.labels[indices])

    def _keep(self, indices: NDArray[np.int64]) -> None:
        super()._keep(indices)
        self.images = self.images[indices]


def build_arrays(
    info: DatasetInfo,
    options: LoadOptions,
    *,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> LongTailData:
    """A data set of images in memory: the long-tail subset of ``train``, and ``test``.

    Args:
        info: the data set.
        options: how it is loaded; with an ``image_size`` all images are resized at once, bilinearly, and kept so.
        train, test: images uint8 [N, C, H, W], and labels int64 [N], known to be in range.
        class_names: one name a class.
        mean, std: of the normalisation, for pixels in [0, 1].

    Raises:
        DataError: a part has no images, or the subset leaves a class without any.
    """
    for part, (_, labels) in (("training", train), ("test", test)):
        if len(labels) == 0:
            raise DataError(f"{info.name}: there are no {part} images; {info.how_obtained}")
    images, labels = train
    if options.imbalance_factor is not None:
        kept = long_tail_indices(labels, len(class_names), options.imbalance_factor, options.subset, options.long_tail)
        images, labels = images[kept], labels[kept]
    identity = fingerprint(images, labels)  # of what was read: resizing may be rounded otherwise elsewhere
    if options.image_size is not None:
        images, test = _resized(images, options.image_size), (_resized(test[0], options.image_size), test[1])
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
        fingerprint=identity,
        info=info,
    )


def _resized(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    pixels = torch.from_numpy(images).float()
    resized = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8).numpy()
