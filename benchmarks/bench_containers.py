"""Encoded photographs from different containers: files, our pack, Arrow IPC, WebDataset and LitData.

A call reads 4096 JPEG images of some 20 KB once each, in an order that is drawn anew for every call; every byte is
looked at once, by a CRC-32, in place of a decoder. All is in the page cache, so this is the containers' own cost. The
pack checks that CRC-32 against its index; the others only compute it. WebDataset reads the tar archives of the pack one
after the other, through a shuffle buffer of 1000 images, and LitData shuffles within its chunks of 64 MB; both shuffle
less than the others.

Arrow (``pyarrow``), WebDataset (``webdataset``) and LitData (``litdata``) take part where they are installed.
"""

import contextlib
import importlib.util
import io
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from shike_fast.data import load_dataset
from shike_fast.data.__main__ import main as data_command
from shike_fast.data.images.files import ImageDataset

IMAGES = 4096
SIZE = (341, 256)
CASES: dict[str, tuple[str, ...]] = {"cpu": (f"{IMAGES} images",), "cuda": ()}
BUFFER = 1000

Read = Callable[[np.ndarray], Iterable[bytes | memoryview]]  # the images of these numbers, in this order or its own


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """``files``, a folder of photographs, and ``pack``, the pack of it with the very same bytes."""
    root = tmp_path_factory.mktemp("photos")
    source = [Image.fromarray(image) for image in load_sample_images().images]
    draw = np.random.default_rng(0)
    for part, count in (("train", IMAGES), ("val", 2)):
        for number in range(count):
            folder = root / "files" / part / f"class{2 * number // count}"
            folder.mkdir(parents=True, exist_ok=True)
            image = source[number % len(source)]
            width = draw.uniform(0.5, 0.8) * image.width
            height = width * SIZE[1] / SIZE[0]
            left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
            image = image.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
            content = simplejpeg.encode_jpeg(np.asarray(image), 85, colorsubsampling="420")
            (folder / f"{number:05d}.jpg").write_bytes(content)
    arguments = ["--dataset", "imagefolder", "--data-dir", str(root / "files"), "--shard-images", "1024"]
    assert data_command(["pack", *arguments, str(root / "pack")]) == 0
    return root


def read_store(folder: Path) -> Read:
    """Our stores: a file for each image, or a pack."""
    train = load_dataset("imagefolder", data_dir=folder).train
    assert isinstance(train, ImageDataset)
    store = train.store
    return lambda order: (store.read(index) or b"" for index in order.tolist())


def read_arrow(root: Path, contents: list[bytes]) -> Read:
    import pyarrow as pa

    path = root / "images.arrow"
    schema = pa.schema([("image", pa.binary())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(contents), 256):
            writer.write_batch(pa.record_batch([pa.array(contents[start : start + 256], pa.binary())], schema))
    column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]
    return lambda order: (column[index].as_buffer() for index in order.tolist())


def read_webdataset(root: Path, contents: list[bytes]) -> Read:
    import webdataset

    shards = sorted(map(str, (root / "pack").glob("train-*.tar")))

    def read(order: np.ndarray) -> Iterable[bytes]:
        mixed = [shards[i] for i in np.argsort(order[: len(shards)])]
        images = webdataset.WebDataset(mixed, shardshuffle=False, empty_check=False).shuffle(BUFFER)
        return (sample["jpg"] for sample in images)

    return read


def read_litdata(root: Path, contents: list[bytes]) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = root / "litdata"
    folder.mkdir(exist_ok=True)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for index, content in enumerate(contents):
        writer[index] = content
    writer.done()
    writer.merge()
    return lambda order: StreamingDataset(str(folder), shuffle=True, seed=int(order[0]))


OPTIONAL = {
    "Arrow IPC": ("pyarrow", read_arrow),
    f"WebDataset, buffer of {BUFFER}": ("webdataset", read_webdataset),
    "LitData": ("litdata", read_litdata),
}


def make_readers(root: Path) -> tuple[dict[str, Read], dict[str, str]]:
    """All contenders, and why those are missing that are not there."""
    readers = {"pack": read_store(root / "pack"), "image files": read_store(root / "files")}
    contents = list(map(bytes, readers["pack"](np.arange(IMAGES))))
    missing = {}
    for name, (package, make) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed"
            continue
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            readers[name] = make(root, contents)
    return readers, missing


@pytest.mark.op("reading encoded images")
def test_containers(case, device, photos, side_by_side, benchmark):
    readers, missing = make_readers(photos)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    draw = np.random.default_rng(0)
    expected = sum(zlib.crc32(content) for content in readers["image files"](np.arange(IMAGES)))

    def call(name: str) -> None:
        images = readers[name](draw.permutation(IMAGES))
        if name == "pack":  # each of its bytes has been looked at
            assert sum(len(content) > 0 for content in images) == IMAGES
        else:
            assert sum(map(zlib.crc32, images)) == expected

    facts = {}
    for name in readers:
        tracemalloc.start()
        call(name)
        facts[name] = {"peak_extra_bytes": tracemalloc.get_traced_memory()[1]}
        tracemalloc.stop()
    calls = {name: lambda name=name: call(name) for name in readers}
    side_by_side(calls, images=IMAGES, calls=1, rounds=7, facts=facts)
    benchmark.extra_info["missing"] = missing
