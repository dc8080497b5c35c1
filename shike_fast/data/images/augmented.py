"""What all data sets of images have in common: samples by index, augmented and normalised on any device."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from shike_fast.data.augment.batched import Augmentation, BatchedAugmentation, Normalise


class AugmentedDataset(Dataset[tuple[Tensor, int]], ABC):
    """Images with labels, an augmentation and a normalisation.

    Attributes:
        augmentations: those that a data set of the kind knows, by name.
        loaders: what ``--loader auto``, ``cpu``, ``gpu`` and ``device`` mean for it
            (:func:`shike_fast.data.loaders.choice.loader_class`).
        labels: int64 [N].
        augmentation: the name of one of them.
        shape: C, H, W of the samples.
        seed: seed of the augmentation where the caller names no other.
        normalise: what follows the augmentation.
    """

    augmentations: ClassVar[Mapping[str, Augmentation]]
    loaders: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        labels: NDArray[np.int64],
        shape: tuple[int, int, int],
        *,
        augmentation: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
    ) -> None:
        self.labels = labels
        self.shape = shape
        self.augmentation = augmentation
        self.seed = seed
        self.normalise = Normalise(mean, std)
        self._on_devices: dict[str, BatchedAugmentation] = {}

    @property
    def augment(self) -> Augmentation:
        """What is done to the pixels."""
        return self.augmentations[self.augmentation]

    def augmentation_on(self, device: torch.device) -> BatchedAugmentation:
        """The augmentation and the normalisation on a device."""
        if str(device) not in self._on_devices:
            self._on_devices[str(device)] = BatchedAugmentation(self.augment, self.normalise, self.shape, device)
        return self._on_devices[str(device)]

    def augmented_by(self, augmentation: str) -> Self:
        """The same images with another training augmentation, sharing memory and files with these.

        Raises:
            ValueError: it is none of :attr:`augmentations`.
        """
        if augmentation not in self.augmentations:
            known = ", ".join(self.augmentations)
            raise ValueError(f"augmented_by: unknown augmentation {augmentation!r}; choose one of {known}")
        other = copy.copy(self)
        other.augmentation = augmentation
        other._on_devices = {}
        return other

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(np.array([range(len(self))[index]]), seed=self.seed, epoch=0)
        return images[0], int(labels[0])

    def selected(self, indices: NDArray[np.int64]) -> Self:
        """Some of the samples, in the order of ``indices``: a data set as if there were no others."""
        chosen = copy.copy(self)
        chosen._keep(indices)
        return chosen

    def _keep(self, indices: NDArray[np.int64]) -> None:
        self.labels = self.labels[indices]

    @property
    @abstractmethod
    def wants_workers(self) -> bool:
        """Whether worker processes pay off, because decoding or the augmentation is slow."""

    @abstractmethod
    def batch(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W], channels-last, and int64 labels [B].

        A row depends on (seed, epoch, index, repeat) alone.
        """
