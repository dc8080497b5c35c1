"""Data sets of list files: where the images are on this disk, for they are unpacked and named in several ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shike_fast._util.text import printable
from shike_fast.data.datasets.lists import ListedImages, Lists, read_lists
from shike_fast.data.images.files import ImagePart, build_images
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

PROBES = 32  # files of a split that are looked for in every place

# A listed path and the label of its image become the path on disk, or None where this layout has no place for it.
Rewrite = Callable[[bytes, int], bytes | None]


@dataclass(frozen=True)
class Layout:
    """A way in which the files may be laid out on disk.

    Attributes:
        folder: what comes before each path, relative to the data folder.
        rewrite: how a listed path changes; None: not at all.
    """

    folder: str = ""
    rewrite: Rewrite | None = None

    def path(self, listed: bytes, label: int) -> bytes | None:
        """Where a file is, relative to ``folder``."""
        return listed if self.rewrite is None else self.rewrite(listed, label)


def build_listed(
    info: DatasetInfo,
    options: LoadOptions,
    lists: Lists,
    *,
    layouts: Sequence[Layout],
    class_names: Sequence[str],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> LongTailData:
    """The data set of the images that lists name, wherever they are below the data folder.

    Args:
        info: the data set.
        options: how it is loaded.
        lists: its images.
        layouts: where they may be.
        class_names: one name a class.
        mean, std: of its normalisation, for pixels in [0, 1].

    Raises:
        DataError: none of the files of a list is anywhere.
    """
    root = require_data_dir(info, options)
    train, test = (find_files(info, root, images, layouts) for images in (lists.train, lists.test))
    identity = lists.train.paths.arrays
    return build_images(
        info, options, train=train, test=test, class_names=tuple(class_names), mean=mean, std=std, identity=identity
    )


def load_listed_images(
    info: DatasetInfo,
    options: LoadOptions,
    *,
    train: str,
    test: str,
    val: str | None = None,
    folder: str = "",
    class_names: Sequence[str] | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> LongTailData:
    """Load a data set whose training and test images are named by list files, lines ``relative/path label``.

    Args:
        info: the data set. If it states counts, the lists are checked against them.
        options: how it is loaded.
        train, test: names of the list files in the data folder.
        val: name of a third list, which is only checked, where it is there.
        folder: what the paths are relative to, itself relative to the data folder.
        class_names: one name a class; None: "class 0000", "class 0001", …
        mean, std: of the normalisation, for pixels in [0, 1].

    Raises:
        DataError: a list is missing, damaged or not what the counts say, or none of its images is there.
    """
    lists = read_lists(info, options, train=train, test=test, val=val)
    names = numbered_names(lists.num_classes) if class_names is None else class_names
    if len(names) < lists.num_classes:
        raise DataError(f"{info.name}: {len(names)} class names for {lists.num_classes} classes")
    layouts = [Layout(folder)]
    return build_listed(info, options, lists, layouts=layouts, class_names=names, mean=mean, std=std)


def numbered_names(num_classes: int) -> tuple[str, ...]:
    """Names for classes that have none: "class 0000", "class 0001", …"""
    return tuple(f"class {label:04d}" for label in range(num_classes))


def find_files(info: DatasetInfo, root: Path, images: ListedImages, layouts: Sequence[Layout]) -> ImagePart:
    """The layout in which the files of a list are on disk: the first of those with most of some evenly spaced files."""
    probes = np.unique(np.linspace(0, len(images) - 1, PROBES, dtype=np.int64))
    best: Layout | None = None
    most = 0
    for layout in layouts:
        found = sum(_exists(root, layout, images, int(i)) for i in probes)
        if found > most:
            best, most = layout, found
        if most == len(probes):
            break
    if best is None:
        raise DataError(_nowhere(info, root, images, layouts))
    store = FileStore(root / best.folder, _rewritten(images, best))
    return ImagePart(store, images.labels)


def _exists(root: Path, layout: Layout, images: ListedImages, index: int) -> bool:
    path = layout.path(images.paths.raw(index), int(images.labels[index]))
    return path is not None and os.path.exists(os.path.join(os.fsencode(root / layout.folder), path))


def _rewritten(images: ListedImages, layout: Layout) -> PathTable:
    if layout.rewrite is None:
        return images.paths
    listed = map(images.paths.raw, range(len(images)))
    pairs = zip(listed, images.labels.tolist(), strict=True)
    return PathTable(layout.rewrite(path, label) or path for path, label in pairs)


def _nowhere(info: DatasetInfo, root: Path, images: ListedImages, layouts: Sequence[Layout]) -> str:
    example, label = images.paths.raw(0), int(images.labels[0])
    paths = [(layout.folder, layout.path(example, label)) for layout in layouts]
    places = [os.path.join(os.fsencode(folder), path) for folder, path in paths if path is not None]
    tried = ", ".join(map(printable, dict.fromkeys(places)))
    return (
        f"{info.name}: the images of {images.source.name} are not in {root}: no {printable(example)} "
        f"(looked for {tried}), nor any other of {min(PROBES, len(images))} tried; {info.how_obtained}"
    )
