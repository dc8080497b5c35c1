"""``cifar10-lt`` and ``cifar100-lt``: CIFAR (Krizhevsky, 2009) from its archives or their extracted folders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shike_fast.data.datasets.archives import AGAIN, check_md5, read_file, read_tar_members
from shike_fast.data.datasets.download import download
from shike_fast.data.datasets.pickles import load_dictionary
from shike_fast.data.images.arrays import build_arrays
from shike_fast.data.recipes import SMALL_IMAGES
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, check_labels, require_data_dir
from shike_fast.errors import DataError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_LARGEST_FILE = 1 << 28  # the largest real one has 155 MB

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
    """.split()
)

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Form:
    """One of the two published forms of a data set.

    Attributes:
        archive: file name of the archive.
        md5: its checksum as published.
        folder: the folder the archive unpacks to.
        train, test: file names, in order.
        read: parses the content of one file: (content, name for errors, records or None) -> images and labels.
    """

    archive: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[bytes, str, int | None], Part]


def _binary_reader(label_bytes: int) -> Callable[[bytes, str, int | None], Part]:
    """Records of label bytes (the last one is the label: CIFAR-100 puts the coarse one first) and 3072 pixels."""

    def read(content: bytes, source: str, records: int | None) -> Part:
        length = label_bytes + _PIXELS
        found, rest = divmod(len(content), length)
        if rest or (records is not None and found != records):
            expected = f"a multiple of {length}" if records is None else f"{records} records of {length}"
            raise DataError(f"{source}: {len(content)} bytes, expected {expected}; {AGAIN}")
        table = np.frombuffer(content, np.uint8).reshape(found, length)
        return table[:, label_bytes:].reshape(found, *SHAPE), table[:, label_bytes - 1].astype(np.int64)

    return read


def _python_reader(label_key: str) -> Callable[[bytes, str, int | None], Part]:
    """A pickled dictionary with ``data`` uint8 [N, 3072] and a list of labels."""

    def read(content: bytes, source: str, records: int | None) -> Part:
        batch = load_dictionary(content, source)
        data, labels = batch.get("data"), batch.get(label_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
            raise DataError(f"{source}: 'data' is not an array of bytes [N, {_PIXELS}]; {AGAIN}")
        if not isinstance(labels, list) or not all(isinstance(label, int) and abs(label) < 2**31 for label in labels):
            raise DataError(f"{source}: {label_key!r} is not a list of integers; {AGAIN}")
        if len(labels) != len(data) or (records is not None and len(data) != records):
            raise DataError(
                f"{source}: {len(data)} images and {len(labels)} labels, expected {records or len(data)}; {AGAIN}"
            )
        return data.reshape(-1, *SHAPE), np.array(labels, dtype=np.int64)

    return read


@dataclass(frozen=True)
class Cifar:
    """The files of a CIFAR data set; the first form is the one that is downloaded.

    Attributes:
        forms: the forms in which it may be on disk.
        class_names: in class-id order.
    """

    forms: tuple[Form, ...]
    class_names: tuple[str, ...]


TRAIN_IMAGES = 50_000
TEST_IMAGES = 10_000
_BASE_URL = "https://www.cs.toronto.edu/~kriz"

CIFAR10 = Cifar(
    forms=(
        Form(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
            _binary_reader(1),
        ),
        Form(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            _python_reader("labels"),
        ),
    ),
    class_names=CIFAR10_CLASSES,
)

CIFAR100 = Cifar(
    forms=(
        Form(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            ("train.bin",),
            ("test.bin",),
            _binary_reader(2),
        ),
        Form(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            ("train",),
            ("test",),
            _python_reader("fine_labels"),
        ),
    ),
    class_names=CIFAR100_CLASSES,
)


def _info(name: str, classes: int, cifar: Cifar) -> DatasetInfo:
    files = " or ".join(f"{form.archive} (or its folder {form.folder})" for form in cifar.forms)
    return DatasetInfo(
        name=name,
        description=f"photographs, 32x32 colour, {classes} classes (50,000 images before the subset, 10,000 to test)",
        how_obtained=f"--data-dir DIR with {files}, or --data-dir DIR --download",
        default_imbalance_factor=100.0,
        augmentations=("cifar", "none", "shift", "crop-flip"),
        downloadable=True,
        recipe=SMALL_IMAGES,  # published for both
    )


@register_dataset(_info("cifar10-lt", 10, CIFAR10))
def load_cifar10(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read CIFAR-10 in whichever form is there and take the long-tail subset."""
    return _load(CIFAR10, info, options)


@register_dataset(_info("cifar100-lt", 100, CIFAR100))
def load_cifar100(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read CIFAR-100 (fine labels) in whichever form is there and take the long-tail subset."""
    return _load(CIFAR100, info, options)


def _load(cifar: Cifar, info: DatasetInfo, options: LoadOptions) -> LongTailData:
    form, contents = _read_files(cifar, info, require_data_dir(info, options), options)
    return build_arrays(
        info,
        options,
        train=_read_part(cifar, form, form.train, contents, TRAIN_IMAGES if options.verify else None),
        test=_read_part(cifar, form, form.test, contents, TEST_IMAGES if options.verify else None),
        class_names=cifar.class_names,
        mean=MEAN,
        std=STD,
    )


def _read_files(
    cifar: Cifar, info: DatasetInfo, data_dir: Path, options: LoadOptions
) -> tuple[Form, dict[str, tuple[str, bytes]]]:
    """Find one form of the data: its files' contents by name, each with what to call it in an error.

    Extracted folders come first (inside ``data_dir``, or ``data_dir`` itself), then archives, then the download.
    """
    for form in cifar.forms:
        for folder in (data_dir / form.folder, data_dir):
            if any((folder / name).is_file() for name in form.train + form.test):
                paths = {name: folder / name for name in form.train + form.test}
                for path in paths.values():
                    if not path.is_file():
                        raise DataError(
                            f"{path}: missing from an otherwise extracted archive; extract {form.archive} again"
                        )
                return form, {name: (str(path), read_file(path)) for name, path in paths.items()}
    for form in cifar.forms:
        if (data_dir / form.archive).is_file():
            return form, _read_archive(form, data_dir / form.archive, options.verify)
    if not options.download:
        raise DataError(f"{info.name}: no files in {data_dir}; {info.how_obtained}")
    form = cifar.forms[0]
    download(f"{_BASE_URL}/{form.archive}", data_dir / form.archive, form.md5)
    return form, _read_archive(form, data_dir / form.archive, verify=False)  # its checksum was right a moment ago


def _read_archive(form: Form, archive: Path, verify: bool) -> dict[str, tuple[str, bytes]]:
    if verify:
        check_md5(archive, form.md5)
    members = read_tar_members(archive, form.train + form.test, _LARGEST_FILE)
    return {name: (f"{archive} ({name})", content) for name, content in members.items()}


def _read_part(
    cifar: Cifar, form: Form, names: tuple[str, ...], contents: dict[str, tuple[str, bytes]], expected: int | None
) -> Part:
    """Concatenate the files of one part; ``expected`` images in all, the same number in each file."""
    records = None if expected is None else expected // len(names)
    parts = []
    for source, content in (contents[name] for name in names):
        images, labels = form.read(content, source, records)
        check_labels(labels, len(cifar.class_names), source)
        parts.append((images, labels))
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
