"""A trained network with what it takes to use it: class names, transform, and how its experts decide together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor, nn

from shike_fast.data.images.prepared import AnyImage, ImageTransform
from shike_fast.engine.inference import Trained


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


class Classifier(nn.Module):
    """A trained network that classifies images. :func:`shike_fast.load` reads one, a run has one as ``run.model``.

    ``forward(images, stage=None)`` takes normalised images [B, channels, H, W] and returns the logits of all experts
    [K, B, C], by the classifiers of the stage that was trained last unless ``stage`` names others.

    Attributes:
        network: the network.
        class_names: one name a class.
        class_counts: int64 [C], training images of each class.
        transform: turns an image into what the network takes.
        trained: what the checkpoint holds besides.
    """

    def __init__(self, trained: Trained, source: object) -> None:
        super().__init__()
        self.network = trained.network.eval()
        if trained.config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = trained
        self.class_names: tuple[str, ...] = tuple(trained.data["class_names"])
        self.class_counts: Tensor = trained.data["class_counts"]
        self.transform = ImageTransform.from_description(trained.data, source)

    @property
    def device(self) -> torch.device:
        """Where the network is; images may be anywhere."""
        return next(self.network.parameters()).device

    def forward(self, images: Tensor, stage: int | None = None) -> Tensor:
        with self.trained.autocast():
            return self.network(images, stage=self.trained.classifiers if stage is None else stage)

    def scores(self, images: Tensor) -> Tensor:
        """What the experts say together, as the method combines them: normalised images -> float32 [B, C]."""
        return self.trained.scores(self(images).float())

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
        self.network.eval()
        batches = [self.scores(batch.to(self.device)).softmax(1).cpu() for batch in self._batches(images, batch_size)]
        empty = torch.empty(0, len(self.class_names))
        return Predictions(torch.cat(batches) if batches else empty, self.class_names)

    def _batches(self, images: AnyImage | Iterable[AnyImage], size: int) -> Iterator[Tensor]:
        if isinstance(images, Tensor) and images.is_floating_point():
            yield from (images[None] if images.dim() == 3 else images).split(size)
            return
        single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4
        remaining: Iterator[AnyImage] = iter([images] if single else images)  # type: ignore[list-item, arg-type]
        while batch := list(islice(remaining, size)):
            yield self.transform.batch(batch)

    def extra_repr(self) -> str:
        return f"{len(self.class_names)} classes, {self.transform}"
