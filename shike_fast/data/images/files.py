"""Data sets of image files: how one becomes a square of pixels, and what stands for a broken one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shike_fast.data.augment.batched import to_device
from shike_fast.data.augment.crop import random_crop_box
from shike_fast.data.augment.photo import PHOTO_AUGMENTATIONS
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.data.images.broken import Broken, BrokenImages
from shike_fast.data.images.decode import BrokenImageError, Picture, Pixels
from shike_fast.data.images.stores import ImageStore, Subset
from shike_fast.data.images.transforms import MARGIN, evaluation_pixels, training_pixels
from shike_fast.data.longtail import long_tail_indices
from shike_fast.data.types import (
    DatasetInfo,
    LoadOptions,
    LongTailData,
    ValidationSplit,
    count_classes,
    fingerprint,
)
from shike_fast.errors import DataError

DEFAULT_SIZE = 224

_MOST_IN_A_ROW = 100  # broken images after which the search for a readable one is given up


@dataclass(frozen=True)
class PixelBatch:
    """Images of one size, before augmentation.

    Attributes:
        pixels: uint8 [B, 3, S, S], channels-last or contiguous, as the augmentation wants it.
        labels: int64 [B].
        indices: int64 [B], whose random words the augmentation takes.
        repeats: int64 [B], how many times the epoch has shown each of them before; None: never.
        broken: images that another one, or plain grey, stands for.
    """

    pixels: Tensor
    labels: Tensor
    indices: NDArray[np.int64]
    repeats: NDArray[np.int64] | None = None
    broken: tuple[Broken, ...] = ()

    def pin_memory(self) -> PixelBatch:
        """The same in pinned memory."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


class ImageDataset(AugmentedDataset):
    """Encoded images, decoded, cropped and resized one by one, then augmented a batch at a time.

    A training image that cannot be read is replaced by the next one that can, with that one's label; a test image by a
    plain grey one under its own label, so that it counts, most likely as wrong, and accuracy is never flattered.

    Attributes:
        store: the images.
        augmentation: "none" is the test transform: resize the short side to size · margin, centre crop.
        size: side of the samples in pixels.
        training: these are training images, even if they are treated like test images.
        strict: an image that cannot be read raises DataError instead.
        margin: short side before over side after the crop of the test transform.
        wants_workers: worker processes pay off.
    """

    augmentations = PHOTO_AUGMENTATIONS
    loaders: ClassVar = {"auto": "files", "cpu": "files", "gpu": "files on GPU"}
    wants_workers = True

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
        super().__init__(labels, (3, size, size), augmentation=augmentation, mean=mean, std=std, seed=seed)
        self.store = store
        self.size = size
        self.training = training
        self.strict = strict
        self.margin = margin
        self._mean = mean
        self._broken = BrokenImages(len(labels), self.stand_in, most=len(labels))  # used where there is no loader

    def _keep(self, indices: NDArray[np.int64]) -> None:
        super()._keep(indices)
        self.store = Subset(self.store, indices)
        self._broken = BrokenImages(len(indices), self.stand_in, most=len(indices))

    @property
    def stand_in(self) -> str:
        """What a message says of an image that cannot be read."""
        return "another image stands in for it" if self.training else "it is tested as plain grey"

    def batch(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        pixels = self.pixels(indices, seed=seed, epoch=epoch, repeats=repeats)
        self._broken.add(pixels.broken)
        return self.normalised(self.augmented(pixels, seed=seed, epoch=epoch)), pixels.labels

    def pixels(
        self, indices: NDArray[np.int64], *, seed: int, epoch: int, repeats: NDArray[np.int64] | None = None
    ) -> PixelBatch:
        """Decode, crop and resize.

        Raises:
            DataError: an image cannot be read and the data set is strict, or so many cannot that none is left.
        """
        return pixels_of_views([self], indices, [{"seed": seed, "epoch": epoch, "repeats": repeats}])[0]

    def decode(
        self, words: NDArray[np.uint32], result: Tensor, index: int, opened: Callable[[int], Picture] | None = None
    ) -> None:
        """Decode, crop and resize one image.

        Args:
            words: random words of the sample that it is for.
            result: uint8 [3, S, S], which is overwritten.
            index: the image.
            opened: opens an image; default the store's.

        Raises:
            BrokenImageError: it cannot be read.
        """
        picture = (opened or self.store.open)(index)
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
            broken: gets each failure.

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
        plans = steps.plan(self.augment.draw(batch.indices, seed=seed, epoch=epoch, repeats=batch.repeats))
        return steps.augment(batch.pixels, to_device(plans, batch.pixels.device))

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to float32, channels-last."""
        return self.augmentation_on(pixels.device).normalise(pixels)


class _Decoding:
    """A batch of a view that is being decoded, image by image."""

    def __init__(
        self, view: ImageDataset, indices: NDArray[np.int64], *, repeats: NDArray[np.int64] | None = None, **draw: int
    ) -> None:
        self._view = view
        self._indices, self._repeats = indices, repeats
        self._words = view.augment.draw(indices, repeats=repeats, **draw)
        shape = (len(indices), 3, view.size, view.size)
        layout = torch.channels_last if view._interleaved else torch.contiguous_format
        self._pixels = torch.empty(shape, dtype=torch.uint8, memory_format=layout)
        self._labels = view.labels[indices]
        self._broken: list[Broken] = []

    def add(self, b: int, opened: Callable[[int], Picture]) -> None:
        """Decode image ``b`` of the batch."""
        decode = partial(self._view.decode, self._words[b], self._pixels[b], opened=opened)
        label = self._view.readable(int(self._indices[b]), decode, self._broken)
        if label is None:
            self._pixels[b] = self._view.grey
        else:
            self._labels[b] = label

    def finished(self) -> PixelBatch:
        labels = torch.from_numpy(self._labels)
        return PixelBatch(self._pixels, labels, self._indices, self._repeats, tuple(self._broken))


def pixels_of_views(
    views: Sequence[ImageDataset], indices: NDArray[np.int64], draws: Sequence[Mapping[str, Any]]
) -> list[PixelBatch]:
    """Decode, crop and resize images for several views of them; a file is opened once, and decoded once a reduction.

    Args:
        views: data sets of the same images.
        indices: int64 [B].
        draws: for each view what :meth:`ImageDataset.pixels` gets besides.

    Raises:
        DataError: an image cannot be read and the data set is strict, or so many cannot that none is left.
    """
    batches = [_Decoding(view, indices, **draw) for view, draw in zip(views, draws, strict=True)]
    for b in range(len(indices)):
        opened = views[0].store.open if len(views) == 1 else _Opened(views[0].store)
        for batch in batches:
            batch.add(b, opened)
    return [batch.finished() for batch in batches]


class _Opened:
    """Opens images of a store and keeps them, with what was decoded of them."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._kept: dict[int, Picture] = {}

    def __call__(self, index: int) -> Picture:
        if index not in self._kept:
            self._kept[index] = _KeptPicture(self._store.open(index))
        return self._kept[index]


class _KeptPicture:
    def __init__(self, picture: Picture) -> None:
        self.width, self.height, self.plain_jpeg = picture.width, picture.height, picture.plain_jpeg
        self._picture = picture
        self._decoded: dict[int, Pixels] = {}

    def pixels(self, reduction: int = 1) -> Pixels:
        if reduction not in self._decoded:
            self._decoded[reduction] = self._picture.pixels(reduction)
        return self._decoded[reduction]


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
    validation: ValidationSplit | None = None,
    notes: tuple[str, ...] = (),
) -> LongTailData:
    """A data set of image files: ``train``, or the long-tail subset of it that is asked for, and ``test``.

    Args:
        info: the data set.
        options: how it is loaded.
        train, test: its images.
        class_names: one name a class.
        mean, std: of its normalisation.
        identity: what tells the whole training set from every other: the names of its images, for example.
        validation: ``test`` is a part that was set aside from the training images.
        notes: sentences on what was found and done, for the head of a run.
    """
    for part, images in (("training", train), ("test", test)):
        if len(images.labels) == 0:
            raise DataError(f"{info.name}: there are no {part} images; {info.how_obtained}")
    labels, store = train.labels, train.store
    if options.imbalance_factor is not None:
        kept = long_tail_indices(labels, len(class_names), options.imbalance_factor, options.subset, options.long_tail)
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
        info=info,
        validation=validation,
        notes=notes,
    )
