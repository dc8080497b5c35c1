"""File names as arrays: half a million of them in the memory of their bytes, shared by all worker processes."""

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class PathTable:
    """File names in two arrays instead of a list of strings.

    Worker processes share the memory (counting references to strings would copy it page by page), and sending the table
    is one copy. A name is any sequence of bytes that the file system takes, whether it is UTF-8 or not.

    Args:
        paths: the names, as strings of the file system (``os.fsdecode``) or as bytes.
    """

    def __init__(self, paths: Iterable[str | bytes]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._set(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def _set(self, content: NDArray[np.uint8], bounds: NDArray[np.int64]) -> None:
        self._bytes = content  # uint8 [total]
        self._bounds = bounds  # int64 [N + 1]

    @classmethod
    def from_arrays(cls, content: NDArray[np.uint8], bounds: NDArray[np.int64]) -> "PathTable":
        """The table of names ``content[bounds[i] : bounds[i + 1]]``."""
        table = cls.__new__(cls)
        table._set(content, bounds)
        return table

    @property
    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of all names [total], and where each begins and the last one ends [N + 1]."""
        return self._bytes, self._bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """Name ``index`` as the file system has it."""
        return self._bytes[self._bounds[index] : self._bounds[index + 1]].tobytes()

    def take(self, indices: NDArray[np.int64]) -> "PathTable":
        """The table of some of the names."""
        lengths = np.diff(self._bounds)[indices]
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        # Each byte's place: where its name begins here, and how far into the name it is.
        places = np.repeat(self._bounds[:-1][indices] - bounds[:-1], lengths) + np.arange(bounds[-1])
        return PathTable.from_arrays(self._bytes[places], bounds)
