"""Where the files of a list lie on this disk: data sets are unpacked in several ways, and named in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shike_fast.data.datasets.lists import ListedImages, printable
from shike_fast.data.images.files import FileStore, ImagePart
from shike_fast.data.images.paths import PathTable
from shike_fast.errors import DataError

PROBES = 32  # files of a split that are looked for in every place

# A listed path and the label of its image become the path on disk, or None where this layout has no place for it.
Rewrite = Callable[[bytes, int], bytes | None]


@dataclass(frozen=True)
class Layout:
    """A way in which the files may lie on disk.

    Attributes:
        folder: what comes before each path, relative to the data folder.
        rewrite: how a listed path changes; None: not at all.
    """

    folder: str = ""
    rewrite: Rewrite | None = None

    def path(self, listed: bytes, label: int) -> bytes | None:
        """Where a file is, relative to ``folder``."""
        return listed if self.rewrite is None else self.rewrite(listed, label)


def find_files(name: str, root: Path, images: ListedImages, layouts: Sequence[Layout], how_obtained: str) -> ImagePart:
    """Find out in which layout the files of a list are on disk; it is the one with most of some evenly spaced files.

    Args:
        name: the data set, for messages.
        root: its folder.
        images: the list.
        layouts: what is possible; of equals the first is taken.
        how_obtained: the remedy.

    Raises:
        DataError: none of the files is anywhere.
    """
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
        raise DataError(_nowhere(name, root, images, layouts, how_obtained))
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


def _nowhere(name: str, root: Path, images: ListedImages, layouts: Sequence[Layout], how_obtained: str) -> str:
    example, label = images.paths.raw(0), int(images.labels[0])
    paths = [(layout.folder, layout.path(example, label)) for layout in layouts]
    places = [os.path.join(os.fsencode(folder), path) for folder, path in paths if path is not None]
    tried = ", ".join(map(printable, dict.fromkeys(places)))
    return (
        f"{name}: the images of {images.source.name} are not in {root}: no {printable(example)} "
        f"(looked for {tried}), nor any other of {min(PROBES, len(images))} tried; {how_obtained}"
    )
