"""Small generated data in the exact layout of the real sets, and the check that an error is one clear line."""

import contextlib
import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shike_fast.errors import DataError


@pytest.fixture
def data_error() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """``with data_error("a", "b"):`` expects a DataError of one line that holds all these texts."""

    @contextlib.contextmanager
    def expect(*texts: object) -> Iterator[None]:
        with pytest.raises(DataError) as caught:
            yield
        message = str(caught.value)
        assert message == message.strip()
        assert "\n" not in message
        for text in texts:
            assert str(text) in message

    return expect


class CifarMaker:
    """Writes generated CIFAR files. Image ``i`` of a part has all pixels ``i % 251`` and label ``i % classes``."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.stem = "cifar-10" if classes == 10 else "cifar-100"

    def images(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(start, start + count)
        return np.repeat((index % 251).astype(np.uint8)[:, None], 3072, axis=1), index % self.classes

    def parts(self, train: int, test: int, suffix: str) -> dict[str, tuple[int, int]]:
        """File name -> (first image, number of images)."""
        if self.classes == 10:
            files = {f"data_batch_{i + 1}{suffix}": (i * train // 5, train // 5) for i in range(5)}
            return files | {f"test_batch{suffix}": (0, test)}
        return {f"train{suffix}": (0, train), f"test{suffix}": (0, test)}

    def binary(self, train: int, test: int) -> dict[str, bytes]:
        """The files of the binary form."""
        contents = {}
        for name, (start, count) in self.parts(train, test, ".bin").items():
            pixels, labels = self.images(start, count)
            columns = [labels[:, None].astype(np.uint8), pixels]
            if self.classes == 100:
                columns.insert(0, (labels[:, None] // 5).astype(np.uint8))  # the coarse label comes first
            contents[name] = np.concatenate(columns, axis=1).tobytes()
        return contents

    def python(self, train: int, test: int, protocol: int = 2, text_keys: bool = False) -> dict[str, bytes]:
        """The files of the python form."""
        contents = {}
        for name, (start, count) in self.parts(train, test, "").items():
            pixels, labels = self.images(start, count)
            key = "labels" if self.classes == 10 else "fine_labels"
            batch = {"data": pixels, key: [int(label) for label in labels], "filenames": ["x.png"] * count}
            if not text_keys:
                batch = {name.encode("latin1"): value for name, value in batch.items()}
            contents[name] = pickle.dumps(batch, protocol=protocol)
        return contents

    def folder(self, form: str) -> str:
        if form == "python":
            return "cifar-10-batches-py" if self.classes == 10 else "cifar-100-python"
        return "cifar-10-batches-bin" if self.classes == 10 else "cifar-100-binary"

    def extract(self, data_dir: Path, form: str, contents: dict[str, bytes]) -> Path:
        """Write the files as the extracted archive has them; returns their folder."""
        folder = data_dir / self.folder(form)
        folder.mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    def archive(self, data_dir: Path, form: str, contents: dict[str, bytes]) -> Path:
        """Write the files as the archive that is published; returns it."""
        path = data_dir / f"{self.stem}-{form}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for name, content in {"batches.meta": b"unread", **contents}.items():
                member = tarfile.TarInfo(f"{self.folder(form)}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path


@pytest.fixture
def cifar_maker() -> type[CifarMaker]:
    return CifarMaker


def idx(array: np.ndarray) -> bytes:
    """The IDX form of an array of bytes."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_bytes() -> Callable[[np.ndarray], bytes]:
    return idx


@pytest.fixture
def fashion_dir(tmp_path: Path) -> Path:
    """300 + 20 images in the layout of Fashion-MNIST; image ``i`` is filled with ``i % 251``, label ``i % 10``."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for part, count in (("train", 300), ("t10k", 20)):
        index = np.arange(count)
        images = np.repeat(index % 251, 28 * 28).reshape(count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(index % 10)))
    return folder
