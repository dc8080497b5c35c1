"""A validation set for data that come without one: some of the training images of each class are set aside."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.options import Check, at_least, at_most, option
from shike_fast.data.images.files import ImagePart, build_images
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore, Subset
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, ValidationSplit
from shike_fast.errors import DataError

SHARE = 0.1  # of each class


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Options of data sets whose validation images may have to be set aside."""

    val_share: float | None = option(
        None,
        "share of each class that is set aside for validation where a data set has no images for it",
        metavar="F",
        default_text=f"{SHARE:g}",
        check=Check("a number between 0 and 1", lambda value: 0 < value < 1),
    )
    split_seed: int = option(
        0,
        "of the choice of those images, which --seed does not change",
        metavar="N",
        check=(at_least(0), at_most(2**64 - 1)),
    )


def choose(
    labels: NDArray[np.int64], names: Sequence[bytes], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the images to train on and of those to set aside, both rising.

    Of a class of n images round(share · n) are set aside, but at least one and at most n − 1; of a class of one, none.
    They are those whose names have the smallest hashes, so that neither their order nor the other images matter.

    Args:
        labels: int64 [N].
        names: N names.
        share: between 0 and 1.
        seed: of the choice.
    """
    key = seed.to_bytes(8, "little")
    hashes = [int.from_bytes(hashlib.blake2b(name, digest_size=8, key=key).digest(), "little") for name in names]
    counts = np.bincount(labels)
    aside = [0 if n < 2 else min(max(1, math.floor(share * n + 0.5)), n - 1) for n in counts.tolist()]
    order = np.lexsort((np.array(hashes, dtype=np.uint64), labels))  # class by class; of equal hashes the first
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order] = rank < np.repeat(aside, counts)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def set_aside(
    labels: NDArray[np.int64], names: Sequence[bytes], options: SplitOptions, source: object
) -> tuple[NDArray[np.int64], NDArray[np.int64], ValidationSplit]:
    """:func:`choose` as the options say: the two lists of numbers, and what was done.

    Args:
        labels: int64 [N].
        names: N names.
        options: how to choose.
        source: what an error calls the images.

    Raises:
        DataError: no class has two images.
    """
    share = SHARE if options.val_share is None else options.val_share
    left, aside = choose(labels, names, share, options.split_seed)
    if len(aside) == 0:
        raise DataError(
            f"{source}: has no validation images, and none can be set aside, for no class has two images; add some"
        )
    return left, aside, ValidationSplit(share, options.split_seed, tuple(names[i] for i in aside.tolist()), len(names))


def build_parts(
    info: DatasetInfo,
    options: LoadOptions,
    *,
    train: ImagePart,
    test: ImagePart | None,
    names: PathTable,
    sizes: NDArray[np.int64] | None = None,
    class_names: tuple[str, ...],
    source: object,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    notes: tuple[str, ...] = (),
) -> LongTailData:
    """:func:`~shike_fast.data.images.files.build_images`, where a test set is lacking of two parts of ``train``.

    Args:
        info: the data set.
        options: how it is loaded; ``own`` are :class:`SplitOptions`.
        train: the training images.
        test: the test images; None: some of ``train`` are set aside.
        names: of the training images.
        sizes: int64 [N], of the training images in bytes, which tell sets apart whose names are the same.
        class_names: one name a class.
        source: what an error calls the data.
        mean, std: of the normalisation.
        notes: sentences for the head of a run.

    Raises:
        DataError: no image can be set aside, or a share is named where nothing is to be.
    """
    validation = None
    if test is None:
        called = list(map(names.raw, range(len(names))))
        left, aside, validation = set_aside(train.labels, called, options.own, source)
        train, test = _some(train, left), _some(train, aside)
        names, sizes = names.take(left), None if sizes is None else sizes[left]
    elif options.own.val_share is not None:
        raise DataError(f"--val-share: {source} has validation images; leave the option out, or remove them")
    return build_images(
        info,
        options,
        train=train,
        test=test,
        class_names=class_names,
        mean=mean,
        std=std,
        identity=names.arrays if sizes is None else (*names.arrays, sizes),
        validation=validation,
        notes=notes,
    )


def _some(part: ImagePart, kept: NDArray[np.int64]) -> ImagePart:
    store = part.store
    return ImagePart(store.take(kept) if isinstance(store, FileStore) else Subset(store, kept), part.labels[kept])
