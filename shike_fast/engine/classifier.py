"""A trained network with what it takes to use it: class names, transform, and how its experts decide together."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor, nn

from shike_fast.data.images.prepared import AnyImage, ImageTransform
from shike_fast.engine.inference import Trained
from shike_fast.errors import DataError


@dataclass(frozen=True)
class Predictions:
    """The classes of N images.

    Attributes:
        probabilities: float32 [N, C], on the CPU.
        class_names: one name a class.
    """

    probabilities: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def labels(self) -> Tensor:
        """int64 [N], the most probable class of each image."""
        return self.probabilities.argmax(1)

    @property
    def names(self) -> list[str]:
        """The name of that class."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its ``k`` most probable classes by falling probability: names and probabilities."""
        values, classes = self.probabilities.topk(min(k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[label], value) for label, value in zip(labels, row, strict=True)]
            for labels, row in zip(classes.tolist(), values.tolist(), strict=True)
        ]


class ImageClassifier(ABC):
    """Classifies images of any kind.

    Attributes:
        class_names: one name a class.
        transform: turns an image into what :meth:`probabilities` takes.
    """

    class_names: tuple[str, ...]
    transform: ImageTransform

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is; images may be anywhere."""

    @abstractmethod
    def probabilities(self, images: Tensor) -> Tensor:
        """Images [B, channels, S, S], transformed and on :attr:`device` -> float32 [B, C]."""

    @torch.inference_mode()
    def predict(self, images: AnyImage | Iterable[AnyImage], *, batch_size: int = 64) -> Predictions:
        """Classify images.

        Args:
            images: one image or several: paths of files, Pillow images, or uint8 pixels ([H, W], [H, W, 1 or 3] or
                [1 or 3, H, W], of any size). Or a float tensor [B, channels, H, W] (or one image of it) that is
                transformed already, such as the samples of this library's data sets.
            batch_size: images at a time.

        Raises:
            DataError: an image is none of these, or its file cannot be read.
        """
        batches = [self.probabilities(self._placed(batch)).cpu() for batch in self._batches(images, batch_size)]
        empty = torch.empty(0, len(self.class_names))
        return Predictions(torch.cat(batches) if batches else empty, self.class_names)

    def _placed(self, images: Tensor) -> Tensor:
        """Images where the network is, and of its dtype."""
        return images.to(self.device)

    def _batches(self, images: AnyImage | Iterable[AnyImage], size: int) -> Iterator[Tensor]:
        if isinstance(images, Tensor) and images.is_floating_point():
            yield from (images[None] if images.dim() == 3 else images).split(size)
            return
        single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4
        if not single and not isinstance(images, Iterable):
            raise DataError(f"images: must be one image or several, got {type(images).__name__}")
        remaining: Iterator[AnyImage] = iter([images] if single else images)  # type: ignore[list-item, arg-type]
        while batch := list(islice(remaining, size)):
            yield self.transform.batch(batch)


class Classifier(ImageClassifier, nn.Module):
    """A trained network that classifies images. :func:`shike_fast.load` reads one, a run has one as ``run.model``.

    ``forward(images, stage=None)`` takes normalised images [B, channels, H, W] and returns the logits of all experts
    [K, B, C], by the classifiers of the stage that was trained last unless ``stage`` names others.

    Attributes:
        network: the network.
        class_counts: int64 [C], training images of each class.
        trained: what the checkpoint holds besides.
    """

    def __init__(self, trained: Trained, source: object) -> None:
        super().__init__()
        self.network = trained.network.eval()
        if trained.config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = trained
        self.class_names = tuple(trained.data["class_names"])
        self.class_counts: Tensor = trained.data["class_counts"]
        self.transform = ImageTransform.from_description(trained.data, source)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _placed(self, images: Tensor) -> Tensor:
        return images.to(self.device, next(self.network.parameters()).dtype)

    def forward(self, images: Tensor, stage: int | None = None) -> Tensor:
        with self.trained.autocast():
            return self.network(images, stage=self.trained.classifiers if stage is None else stage)

    def probabilities(self, images: Tensor) -> Tensor:
        """Images [B, channels, S, S], transformed -> float32 [B, C], the experts combined as the method does."""
        return self.trained.scores(self(images).float()).softmax(1)

    def extra_repr(self) -> str:
        return f"{len(self.class_names)} classes, {self.transform}"
