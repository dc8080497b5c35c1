"""Data sets of image files: where they are kept, how one becomes a square of pixels, what a broken one becomes."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from shike_fast.data.augment.batched import BatchedAugmentation, to_device
from shike_fast.data.augment.photo import PHOTO_AUGMENTATIONS
from shike_fast.data.augment.small import Augmentation, Normalise
from shike_fast.data.images.decode import BrokenImageError, Encoded, Picture, open_image, unreadable
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.transforms import MARGIN, evaluation_pixels, random_crop_box, training_pixels
from shike_fast.data.longtail import long_tail_indices
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, count_classes, fingerprint
from shike_fast.errors import DataError

DEFAULT_SIZE = 224

_MOST_BYTES = 2**30  # of an image file
_MOST_IN_A_ROW = 100  # broken images after which the search for a readable one is given up


class ImageStore(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Picture:
        """Image ``index``, about to be decoded. Raises BrokenImageError, without the image's name."""
        ...

    def read(self, index: int) -> Encoded | None:
        """Its encoded bytes; None where the pixels are kept as they are. Raises BrokenImageError."""
        ...

    def name(self, index: int) -> str:
        """What a message calls it."""
        ...


def open_regular(path: str) -> io.FileIO:
    """Open a file to read it, but no pipe, which might wait for ever, and no device, which might never end.

    Raises:
        BrokenImageError: it is no regular file, or one far larger than any image.
        OSError: it cannot be opened.
    """
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_BYTES:
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise BrokenImageError("is no regular file")
    raise BrokenImageError(f"has {status.st_size:,} bytes, more than any image")


class FileStore:
    """Image files below a folder.

    Args:
        root: the folder.
        paths: their names relative to it.
    """

    def __init__(self, root: Path, paths: PathTable) -> None:
        self.root = root
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Encoded:
        try:
            with open_regular(self.name(index)) as file:
                return file.read()
        except OSError as error:
            raise unreadable(error) from error

    def open(self, index: int) -> Picture:
        return open_image(self.read(index))

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])


def warn_of_broken(message: str) -> None:
    """Say on standard error that something else stands for an image."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Broken:
    """An image that could not be read: its number, and a line that names it and says why."""

    index: int
    message: str


@dataclass(frozen=True)
class PixelBatch:
    """Images of one size, before augmentation.

    Attributes:
        pixels: uint8 [B, 3, S, S], channels-last or contiguous, as the augmentation wants it.
        labels: int64 [B].
        indices: int64 [B], whose random words the augmentation takes.
        broken: images that another one, or plain grey, stands for.
    """

    pixels: Tensor
    labels: Tensor
    indices: NDArray[np.int64]
    broken: tuple[Broken, ...] = ()

    def pin_memory(self) -> PixelBatch:
        """The same in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Encoded images, decoded, cropped and resized one by one, then augmented a batch at a time.

    A training image that cannot be read is replaced by the next one that can, with that one's label; a test image by a
    plain grey one under its own label, so that it counts, most likely as wrong, and accuracy is never flattered.

    Attributes:
        store: the images.
        labels: int64 [N].
        augmentation: a key of :data:`shike_fast.data.augment.photo.PHOTO_AUGMENTATIONS`; "none" is the test transform:
            resize the short side to size · margin, centre crop.
        size: side of the samples in pixels.
        seed: seed of the augmentation where the caller names no other.
        training: these are training images, even if they are treated like test images.
        strict: an image that cannot be read raises DataError instead.
        margin: short side before over side after the crop of the test transform.
        normalise: the last step.
        one_by_one: worker processes pay off.
    """

    one_by_one = True

    def __init__(
        self,
        store: ImageStore,
        labels: NDArray[np.int64],
        *,
        augmentation: str,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        training: bool = True,
        strict: bool = False,
        margin: float = MARGIN,
    ) -> None:
        self.store = store
        self.labels = labels
        self.augmentation = augmentation
        self.size = size
        self.seed = seed
        self.training = training
        self.strict = strict
        self.margin = margin
        self.normalise = Normalise(mean, std)
        self._mean = mean
        self._batched: dict[str, BatchedAugmentation] = {}
        self._told: set[int] = set()

    @property
    def stand_in(self) -> str:
        """What is told of an image that cannot be read."""
        return "another image stands in for it" if self.training else "it is tested as plain grey"

    @property
    def augment(self) -> Augmentation:
        """What is done to the pixels after they were cropped and resized."""
        return PHOTO_AUGMENTATIONS[self.augmentation]

    def augmentation_on(self, device: torch.device) -> BatchedAugmentation:
        """The batched form of it, and of the normalisation, on a device."""
        if str(device) not in self._batched:
            shape = (3, self.size, self.size)
            self._batched[str(device)] = BatchedAugmentation(self.augment, self.normalise, shape, device)
        return self._batched[str(device)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(np.array([range(len(self))[index]]), seed=self.seed, epoch=0)
        return images[0], int(labels[0])

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W] and int64 labels [B]; a row depends on (seed, epoch, index) alone."""
        pixels = self.pixels(indices, seed=seed, epoch=epoch)
        for image in pixels.broken:
            if image.index not in self._told:
                self._told.add(image.index)
                warn_of_broken(f"{image.message}; {self.stand_in}")
        return self.normalised(self.augmented(pixels, seed=seed, epoch=epoch)), pixels.labels

    def pixels(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> PixelBatch:
        """Decode, crop and resize.

        Raises:
            DataError: an image cannot be read and the data set is strict, or so many cannot that none is left.
        """
        words = self.augment.draw(indices, seed=seed, epoch=epoch)
        shape = (len(indices), 3, self.size, self.size)
        layout = torch.channels_last if self._interleaved else torch.contiguous_format
        result = torch.empty(shape, dtype=torch.uint8, memory_format=layout)
        labels = self.labels[indices]
        broken: list[Broken] = []
        for b, index in enumerate(indices):
            label = self.readable(int(index), partial(self.decode, words[b], result[b]), broken)
            if label is None:
                result[b] = self.grey
            else:
                labels[b] = label
        return PixelBatch(result, torch.from_numpy(labels), indices, tuple(broken))

    def decode(self, words: NDArray[np.uint32], result: Tensor, index: int) -> None:
        """Decode, crop and resize one image.

        Args:
            words: random words of the sample that it is for.
            result: uint8 [3, S, S], which is overwritten.
            index: the image.

        Raises:
            BrokenImageError: it cannot be read.
        """
        picture = self.store.open(index)
        if self.crops:
            training_pixels(picture, random_crop_box(picture.width, picture.height, words), result)
        else:
            evaluation_pixels(picture, result, self.margin)

    @property
    def crops(self) -> bool:
        """Whether a window is drawn anew every time."""
        return self.augmentation != "none"

    @property
    def _interleaved(self) -> bool:
        """Whether pixels are best made channels-last: decoding and normalising are faster so, most operations not."""
        return self.augmentation_on(torch.device("cpu")).any_layout

    @property
    def grey(self) -> Tensor:
        """What a test image that cannot be read is shown as: the mean colour, uint8 [3, 1, 1]."""
        return (255 * torch.tensor(self._mean)).round().to(torch.uint8)[:, None, None]

    def readable(self, index: int, decode: Callable[[int], object], broken: list[Broken]) -> int | None:
        """Decode image ``index`` or, in training, the next one that can be.

        Args:
            index: the image that is wanted.
            decode: is called with the number of an image.
            broken: is told of each failure.

        Returns:
            The label of the image that was decoded; None for a test image that could not be.

        Raises:
            DataError: the data set is strict, or too many images in a row cannot be read.
        """
        tries = min(_MOST_IN_A_ROW, len(self))
        for step in range(tries):
            tried = (index + step) % len(self)
            try:
                decode(tried)
                return int(self.labels[tried])
            except BrokenImageError as error:
                message = f"{self.store.name(tried)}: {error}"
                if self.strict:
                    raise DataError(f"{message}; replace or remove it") from error
                broken.append(Broken(tried, message))
                if not self.training:
                    return None
        raise DataError(
            f"{broken[-1].message}; neither can the images before it be read, {tries} in a row: check --data-dir"
        )

    def augmented(self, batch: PixelBatch, *, seed: int, epoch: int) -> Tensor:
        """What is left of the augmentation, where the pixels are: uint8 [B, 3, S, S], channels-last."""
        steps = self.augmentation_on(batch.pixels.device)
        plans = steps.plan(self.augment.draw(batch.indices, seed=seed, epoch=epoch))
        return steps.augment(batch.pixels, to_device(plans, batch.pixels.device))

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to float32, channels-last."""
        return self.augmentation_on(pixels.device).normalise(pixels)


@dataclass(frozen=True)
class ImagePart:
    """The training or the test images of a data set.

    Attributes:
        store: the images.
        labels: int64 [N], known to be in range.
    """

    store: ImageStore
    labels: NDArray[np.int64]


def build_images(
    info: DatasetInfo,
    options: LoadOptions,
    *,
    train: ImagePart,
    test: ImagePart,
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    identity: tuple[bytes | NDArray[np.generic], ...],
) -> LongTailData:
    """Take the long-tail subset of ``train``, where one is asked for, and wrap both parts.

    Args:
        info: the data set.
        options: how it is loaded.
        train, test: its images.
        class_names: one name a class.
        mean, std: of its normalisation.
        identity: what tells the whole training set from every other: the names of its images, for example.
    """
    for part, images in (("training", train), ("test", test)):
        if len(images.labels) == 0:
            raise DataError(f"{info.name}: there are no {part} images; {info.how_obtained}")
    labels, store = train.labels, train.store
    if options.imbalance_factor is not None:
        kept = long_tail_indices(labels, len(class_names), options.imbalance_factor, options.subset)
        labels, store = labels[kept], Subset(store, kept)
    size = options.image_size or DEFAULT_SIZE

    def dataset(store: ImageStore, labels: NDArray[np.int64], augmentation: str, training: bool) -> ImageDataset:
        return ImageDataset(
            store,
            labels,
            augmentation=augmentation,
            size=size,
            mean=mean,
            std=std,
            seed=options.seed,
            training=training,
            strict=options.strict,
        )

    return LongTailData(
        name=info.name,
        train=dataset(store, labels, options.augmentation, training=True),
        test=dataset(test.store, test.labels, "none", training=False),
        class_names=class_names,
        class_counts=count_classes(labels, len(class_names)),
        in_channels=3,
        image_size=size,
        mean=mean,
        std=std,
        imbalance_factor=options.imbalance_factor,
        augmentation=options.augmentation,
        fingerprint=fingerprint(*identity, labels),
    )


class Subset:
    """Some images of a store.

    Args:
        store: the store.
        kept: int64 [N], their numbers there.
    """

    def __init__(self, store: ImageStore, kept: NDArray[np.int64]) -> None:
        self._store = store
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, index: int) -> Picture:
        return self._store.open(int(self._kept[index]))

    def read(self, index: int) -> Encoded | None:
        return self._store.read(int(self._kept[index]))

    def name(self, index: int) -> str:
        return self._store.name(int(self._kept[index]))
