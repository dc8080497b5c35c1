"""Samples of PyTorch's data sets: images as a store of pictures, finished tensors as a source of batches."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shike_fast.data.images.decode import Picture, Pixels, RawPicture, picture_of, unreadable
from shike_fast.data.random import STREAM_AUGMENTATION, long_words
from shike_fast.errors import DataError

IMAGES, TENSORS = "images", "float tensors"  # kinds of samples

_CHANNELS = (1, 3, 4)


def kind_of(image: object, what: str) -> str:
    """Whether a sample is an image that is to be augmented, or a finished tensor.

    Args:
        image: the first part of a sample.
        what: what an error calls it.

    Raises:
        DataError: it is neither.
    """
    if isinstance(image, Image.Image):
        return IMAGES
    if (
        isinstance(image, Tensor)
        and image.dtype == torch.float32
        and image.ndim == 3
        and image.shape[1] == image.shape[2]
    ):
        return TENSORS
    if isinstance(image, Tensor | np.ndarray) and str(image.dtype).endswith("uint8") and _layout(image.shape):
        return IMAGES
    raise DataError(
        f"{what}: its image must be one of Pillow, uint8 [H, W, C], [C, H, W] or [H, W], or a float32 tensor [C, S, S]"
        f", got {_found(image)}"
    )


def _found(image: object) -> str:
    return f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor | np.ndarray) else type(image).__name__


def _layout(shape: tuple[int, ...]) -> str:
    """``HW``, ``HWC`` or ``CHW``; "" for none of them. Where both fit, channels come last."""
    if len(shape) == 2:
        return "HW"
    if len(shape) == 3 and shape[2] in _CHANNELS:
        return "HWC"
    return "CHW" if len(shape) == 3 and shape[0] in _CHANNELS else ""


def _rgb(pixels: NDArray[np.uint8]) -> Pixels:
    layout = _layout(pixels.shape)
    if layout == "HW":
        pixels = pixels[..., None]
    elif layout == "CHW":
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(
        np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if pixels.shape[2] == 1 else pixels[..., :3]
    )


class SampleStore:
    """The images of a data set whose samples are (image, label).

    Args:
        samples: the data set.
        name: what a message calls it.
    """

    def __init__(self, samples: Any, name: str) -> None:
        self._samples = samples
        self._name = name

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> None:
        return None

    def open(self, index: int) -> Picture:
        try:
            image = self._samples[index][0]
        except OSError as error:
            raise unreadable(error) from error
        if kind_of(image, self.name(index)) == TENSORS:
            raise DataError(f"{self.name(index)}: is a float tensor, where the first one was an image")
        return picture_of(image) if isinstance(image, Image.Image) else RawPicture(_rgb(np.asarray(image)))

    def name(self, index: int) -> str:
        return f"{self._name} {index}"


class TensorSource:
    """Batches of finished tensors, taken as a data set makes them.

    While a sample is made, the generators of Python, NumPy and PyTorch are seeded by (seed, epoch, index, repeat).

    Args:
        samples: the data set.
        kept: int64 [N], the numbers of its samples there.
        labels: int64 [N].
        shape: C, S, S.
        name: what a message calls it.
        seed: where the caller names no other.
    """

    wants_workers = True

    def __init__(
        self,
        samples: Any,
        kept: NDArray[np.int64],
        labels: NDArray[np.int64],
        *,
        shape: tuple[int, ...],
        name: str,
        seed: int,
    ) -> None:
        self.labels = labels
        self.seed = seed
        self._samples = samples
        self._kept = kept
        self._shape = shape
        self._name = name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(np.array([range(len(self))[index]]), seed=self.seed, epoch=0)
        return images[0], int(labels[0])

    def batch(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        """float32 images [B, C, S, S] and int64 labels [B]; a row depends on (seed, epoch, index, repeat) alone."""
        words = long_words(seed, epoch, indices, STREAM_AUGMENTATION, repeats).tolist()
        images = torch.empty(len(indices), *self._shape)
        with _generators_kept():
            for row, (index, word) in enumerate(zip(self._kept[indices].tolist(), words, strict=True)):
                _seed_generators(word)
                image = self._samples[index][0]
                if not isinstance(image, Tensor) or image.dtype != torch.float32 or image.shape != self._shape:
                    raise DataError(
                        f"{self._name} {index}: expected a float32 tensor {list(self._shape)} like the first one, got "
                        f"{_found(image)}"
                    )
                images[row] = image
        return images, torch.from_numpy(self.labels[indices])


def _seed_generators(word: int) -> None:
    random.seed(word)
    np.random.seed(word & 0xFFFFFFFF)
    torch.manual_seed(word)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """The global generators of this process are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
