"""``imagenet-lt``: ImageNet-LT (Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019)."""

from __future__ import annotations

from pathlib import Path

from shike_fast.data.augment.photo import PHOTO_AUGMENTATIONS
from shike_fast.data.datasets.layouts import Layout, find_files
from shike_fast.data.datasets.lists import class_folders, read_lists, read_names
from shike_fast.data.images.files import build_images
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, register_dataset, require_data_dir
from shike_fast.errors import DataError

TRAIN_LIST, VAL_LIST, TEST_LIST = "ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"
SYNSETS = "LOC_synset_mapping.txt"  # of the Kaggle form of ImageNet: "n01440764 tench, Tinca tinca"
KAGGLE = "ILSVRC/Data/CLS-LOC"  # where that form keeps train/ and val/

_DEFAULT = "rrc-jitter-randaugment"
_KAGGLE_PREFIX = f"{KAGGLE}/".encode()

INFO = DatasetInfo(
    name="imagenet-lt",
    description="ImageNet-LT: 115,846 training and 50,000 test photographs, 1000 classes of 1280 to 5",
    how_obtained=(
        "--data-dir DIR with train/ and val/ of ImageNet (ILSVRC 2012, image-net.org, after registration) and with the "
        f"lists {TRAIN_LIST}, {VAL_LIST}, {TEST_LIST} of OpenLongTailRecognition-OLTR"
    ),
    default_imbalance_factor=None,
    augmentations=(_DEFAULT, *(name for name in PHOTO_AUGMENTATIONS if name != _DEFAULT)),
    resizable=True,
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read the lists and find out how the images lie on disk. The list of the validation images is checked only."""
    root = require_data_dir(info, options)
    train, test, num_classes = read_lists(info, options, train=TRAIN_LIST, test=TEST_LIST, val=VAL_LIST)
    folders = class_folders(train, num_classes, _class_folder)
    layouts = _layouts(folders)
    return build_images(
        info,
        options,
        train=find_files(info.name, root, train, layouts, info.how_obtained),
        test=find_files(info.name, root, test, layouts, info.how_obtained),
        class_names=_class_names(root, folders),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        identity=train.paths.arrays,
    )


def _class_folder(path: bytes) -> bytes | None:
    """n01440764 of train/n01440764/X.JPEG."""
    parts = path.split(b"/")
    return parts[-2] if len(parts) > 2 else None


def _layouts(folders: list[bytes | None]) -> list[Layout]:
    """Lists and disks have val/n01440764/X.JPEG or val/X.JPEG; the class folder follows from the label."""

    def plain(path: bytes, label: int) -> bytes:
        return path.removeprefix(_KAGGLE_PREFIX)

    def flat(path: bytes, label: int) -> bytes | None:
        part, _, rest = plain(path, label).partition(b"/")
        return part + b"/" + rest.rpartition(b"/")[2] if part == b"val" else None

    def in_class_folder(path: bytes, label: int) -> bytes | None:
        part, _, rest = plain(path, label).partition(b"/")
        folder = folders[label]
        if part != b"val" or folder is None:
            return None
        return b"/".join((part, folder, rest.rpartition(b"/")[2]))

    as_listed = [Layout(), Layout(KAGGLE)]
    return as_listed + [Layout(folder, form) for folder in ("", KAGGLE) for form in (plain, flat, in_class_folder)]


def _class_names(root: Path, folders: list[bytes | None]) -> tuple[str, ...]:
    """WordNet ids, or what they stand for where the folder holds the file that says it."""
    readable: dict[str, str] = {}
    path = root / SYNSETS
    if path.exists():
        for line in read_names(path):
            synset, _, words = line.partition(" ")
            if not words:
                raise DataError(f"{path}: expected lines 'n01440764 name', got {line[:100]!r}; obtain or remove it")
            readable[synset] = words
    names = (
        f"class {label:04d}" if folder is None else folder.decode("utf-8", "replace")
        for label, folder in enumerate(folders)
    )
    return tuple(readable.get(name, name) for name in names)
