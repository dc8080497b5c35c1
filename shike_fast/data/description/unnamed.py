"""Files below the folder of a data set that are none of its images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shike_fast.data.datasets.imagefolder import EXTENSIONS
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.stores import files_of
from shike_fast.data.types import LongTailData

MOST_NAMED = 20  # files of a kind that are kept by name

_SYSTEM = ("thumbs.db",)  # in lower case: left by systems without a dot before their names


@dataclass(frozen=True)
class UnnamedFiles:
    """Files that no image of a data set is. Hidden files and folders and ``Thumbs.db`` are passed over.

    Attributes:
        folder: below which they are.
        images: number of files with the ending of an image: images without a label.
        image_names: the first of them, relative to the folder.
        image_folders: how many are in each of the folder's own folders, ``"."`` for the folder itself.
        others: number of files that are no images by their endings.
        other_names: the first of them.
        other_endings: how many have each ending, in lower case, ``""`` for none.
        closed: folders that could not be listed.
    """

    folder: str
    images: int
    image_names: tuple[str, ...]
    image_folders: Mapping[str, int]
    others: int
    other_names: tuple[str, ...]
    other_endings: Mapping[str, int]
    closed: tuple[str, ...]


def find_unnamed(data: LongTailData, folder: Path | None) -> UnnamedFiles | None:
    """List the files below a folder that are none of a data set's images; links to folders are not followed.

    The images of which a long-tail subset was taken count as named, all of them.

    Args:
        data: the data set.
        folder: where to look; None: the folder that all its images are in.

    Returns:
        What was found; None if the data set takes no images from files.
    """
    named: set[str] = set()
    roots: list[str] = []
    for part in (data.train, data.test):
        files = files_of(part.store) if isinstance(part, ImageDataset) else None
        if files is not None:
            roots.append(os.path.realpath(files.root))  # the folder may be called by way of a link
            paths = (os.path.join(roots[-1], files.paths[index]) for index in range(len(files)))
            named.update(map(os.path.normpath, paths))
    if not roots:
        return None
    top = os.path.commonpath(roots) if folder is None else os.path.realpath(folder)
    images, others = _Found(), _Found()
    closed: list[str] = []
    for path in _visible(top, closed):
        if path in named:
            continue
        ending = os.path.splitext(path)[1].lower()
        name = os.path.relpath(path, top)
        if ending in EXTENSIONS:
            images.add(name, name.partition(os.sep)[0] if os.sep in name else ".")
        else:
            others.add(name, ending)
    return UnnamedFiles(
        folder=top,
        images=images.kinds.total(),
        image_names=tuple(images.names),
        image_folders=dict(images.kinds.most_common()),
        others=others.kinds.total(),
        other_names=tuple(others.names),
        other_endings=dict(others.kinds.most_common()),
        closed=tuple(closed),
    )


class _Found:
    """Files that are counted by kind, and the first of them by name."""

    def __init__(self) -> None:
        self.kinds = Counter[str]()
        self.names: list[str] = []

    def add(self, name: str, kind: str) -> None:
        self.kinds[kind] += 1
        if len(self.names) < MOST_NAMED:
            self.names.append(name)


def _visible(top: str, closed: list[str]) -> Iterable[str]:
    """The paths of all files below a folder that no system hides, in order; ``closed`` gets what cannot be listed."""

    def note(error: OSError) -> None:
        closed.append(os.path.relpath(error.filename, top))

    for directory, folders, names in os.walk(top, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # os.walk goes into these
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _SYSTEM:
                yield os.path.join(directory, name)
