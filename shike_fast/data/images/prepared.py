"""What becomes of a single image before a network sees it: the transform that a checkpoint brings along."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from shike_fast.data.images.decode import Encoded, Picture, RawPicture, open_image, rgb, unreadable
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.stores import ImageStore, open_regular
from shike_fast.errors import CheckpointError, DataError

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, for networks of grey images

AnyImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class ImageTransform:
    """Resizes the short side of an image to size · margin, cuts out the centre, and normalises each channel.

    ``transform(image)`` is a float32 tensor [channels, size, size]. A network of one channel gets the luma.

    Attributes:
        channels: of the network's images, 1 or 3.
        size: side of the result in pixels.
        mean, std: of each channel or of all, for pixels in [0, 1].
        margin: short side before over side after the crop.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: float

    @classmethod
    def from_description(cls, data: Mapping[str, Any], source: object) -> ImageTransform:
        """The transform that a checkpoint describes.

        Args:
            data: what it says of its data set.
            source: its file, for the error.

        Raises:
            CheckpointError: it does not say how images are transformed, or of more channels than images have.
        """
        try:
            transform = cls(
                data["in_channels"], data["image_size"], tuple(data["mean"]), tuple(data["std"]), data["margin"]
            )
        except KeyError as error:
            raise CheckpointError(
                f"checkpoint {source} does not say how images are transformed (no {error}): an older version wrote it"
            ) from error
        if transform.channels not in (1, 3):
            raise CheckpointError(
                f"checkpoint {source} holds a network for images of {transform.channels} channels; image files have "
                "three, or one where they are grey"
            )
        return transform

    @property
    def resized(self) -> int:
        """The short side in pixels, before the centre is cut out."""
        return round(self.size * self.margin)

    def describe(self) -> dict[str, Any]:
        """Plain values for a file: this and ``resized``."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std), "resized": self.resized}

    def dataset(self, store: ImageStore, *, strict: bool = False) -> ImageDataset:
        """The images of a store, treated like test images; their labels are 0. ``strict``: a broken one is an error."""
        return ImageDataset(
            store,
            np.zeros(len(store), np.int64),
            augmentation="none",
            training=False,
            strict=strict,
            size=self.size,
            mean=self.mean,
            std=self.std,
            margin=self.margin,
        )

    def with_channels(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] as the network takes them: [B, channels, S, S]."""
        if self.channels == 3:
            return images
        # Normalisation is the same for all three channels, so the luma may come after it.
        weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
        return (images * weights[:, None, None]).sum(1, keepdim=True)

    def batch(self, images: Sequence[AnyImage]) -> Tensor:
        """Several images at once: float32 [B, channels, size, size].

        Args:
            images: each a file's path, a Pillow image, or uint8 pixels [H, W], [H, W, 1 or 3], or [1 or 3, H, W].

        Raises:
            DataError: one is none of these, or a file cannot be read.
        """
        dataset = self.dataset(_GivenImages(images), strict=True)
        return self.with_channels(dataset.batch(np.arange(len(images)), seed=0, epoch=0)[0])

    def __call__(self, image: AnyImage) -> Tensor:
        return self.batch([image])[0]


class _GivenImages:
    """A store of images that a caller passes, of whatever kind each is."""

    def __init__(self, images: Sequence[AnyImage]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def open(self, index: int) -> Picture:
        image = self._images[index]
        if isinstance(image, str | os.PathLike):
            return open_image(_read(os.fspath(image)))
        if isinstance(image, Image.Image):
            return RawPicture(np.array(rgb(ImageOps.exif_transpose(image))))
        return RawPicture(_pixels(image, self.name(index)))

    def read(self, index: int) -> Encoded | None:
        return None

    def name(self, index: int) -> str:
        image = self._images[index]
        return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index}"


def _read(path: str) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise unreadable(error) from error


def _pixels(image: object, name: str) -> NDArray[np.uint8]:
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"{name}: must be a path, a Pillow image or uint8 pixels, got {type(image).__name__}")
    shape = list(pixels.shape)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"{name}: pixels must be uint8, got {pixels.dtype} {shape}; images that are normalised already are one "
            "float tensor [B, channels, height, width]"
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise DataError(f"{name}: pixels must be [H, W], [H, W, 1 or 3] or [1 or 3, H, W], got {shape}")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
