"""Where images are kept: an object that reads them by number."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shike_fast.data.images.decode import BrokenImageError, Encoded, Picture, open_image, unreadable
from shike_fast.data.images.paths import PathTable

_MOST_BYTES = 2**30  # of an image file


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

    def take(self, kept: NDArray[np.int64]) -> FileStore:
        """Some of the files, in the order of their numbers here."""
        return FileStore(self.root, self.paths.take(kept))


class Subset:
    """Some images of a store.

    Args:
        store: the store.
        kept: int64 [N], their numbers there.
    """

    def __init__(self, store: ImageStore, kept: NDArray[np.int64]) -> None:
        self.store = store
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def open(self, index: int) -> Picture:
        return self.store.open(int(self.kept[index]))

    def read(self, index: int) -> Encoded | None:
        return self.store.read(int(self.kept[index]))

    def name(self, index: int) -> str:
        return self.store.name(int(self.kept[index]))


def files_of(store: ImageStore) -> FileStore | None:
    """The files that a store takes its images from, all of them; None where it does not take them from files."""
    while isinstance(store, Subset):
        store = store.store
    return store if isinstance(store, FileStore) else None
