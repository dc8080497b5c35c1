"""The forms of the published data sets: what the files of generated ones are called, and what describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from shike_fast.data.datasets import imagenet_lt, inat18, places_lt

Labels = Mapping[str, NDArray[np.int64]]

_KINGDOMS = "Plantae Insecta Aves Reptilia Mammalia Fungi Amphibia Mollusca Arachnida Actinopterygii".split()
_NAMES = 100  # streams of random numbers, of which the images take the first ones
_IDS = 101


@dataclass(frozen=True)
class Listed:
    """The images of a split: relative paths, labels, (width, height) of each."""

    paths: list[str]
    labels: list[int]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """The form of a data set.

    Attributes:
        imbalance_factor: largest / smallest class of the published set.
        test_per_class: test images of each class of the published set.
        has_val: there is a split "val" beside "train" and "test".
        paths: (labels of each split, number of classes, seed) -> the files' relative paths.
        describe: (the splits, number of classes, seed) -> the other files and their contents.
    """

    imbalance_factor: float
    test_per_class: int
    has_val: bool
    paths: Callable[[Labels, int, int], dict[str, list[str]]]
    describe: Callable[[Mapping[str, Listed], int, int], dict[str, bytes]]


def _inat18_paths(labels: Labels, classes: int, seed: int) -> dict[str, list[str]]:
    random = np.random.default_rng((seed, _NAMES))
    return {
        name: [
            f"{inat18.IMAGES}/{_KINGDOMS[label % len(_KINGDOMS)]}/{label:04d}/{random.bytes(16).hex()}.jpg"
            for label in values.tolist()
        ]
        for name, values in labels.items()
    }


def _inat18_files(splits: Mapping[str, Listed], classes: int, seed: int) -> dict[str, bytes]:
    """The two COCO files. Ids and the order of annotations are random, so that nothing but the ids joins them."""
    random = np.random.default_rng((seed, _IDS))
    categories = [
        {"id": label, "name": f"Specimen numerus {label:04d}", "supercategory": _KINGDOMS[label % len(_KINGDOMS)]}
        for label in range(classes)
    ]
    ids = random.permutation(sum(len(split.paths) for split in splits.values())).tolist()
    files = {}
    for name, split in splits.items():
        own, ids = ids[: len(split.paths)], ids[len(split.paths) :]
        images = [
            {
                "id": image_id,
                "width": width,
                "height": height,
                "file_name": path,
                "license": 0,
                "rights_holder": "generated",
            }
            for image_id, path, (width, height) in zip(own, split.paths, split.sizes, strict=True)
        ]
        order = random.permutation(len(own)).tolist()
        annotations = [
            {"id": number, "image_id": own[i], "category_id": split.labels[i]} for number, i in enumerate(order)
        ]
        content = {
            "info": {"description": "generated, in the form of iNaturalist 2018"},
            "images": images,
            "licenses": [{"id": 0, "name": "generated", "url": ""}],
            "annotations": annotations,
            "categories": categories,
        }
        files[inat18.TRAIN_JSON if name == "train" else inat18.VAL_JSON] = msgspec.json.encode(content)
    return files


def _wordnet_id(label: int) -> str:
    return f"n{1440764 + 1013 * label:08d}"


def _imagenet_paths(labels: Labels, classes: int, seed: int) -> dict[str, list[str]]:
    paths: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    # The images of the validation list are images of ImageNet's training set, those of the test list of its other one.
    for name in ("train", "val"):
        for number, label in enumerate(labels[name].tolist(), len(paths["train"])):
            synset = _wordnet_id(label)
            paths[name].append(f"train/{synset}/{synset}_{number}.JPEG")
    for number, label in enumerate(labels["test"].tolist(), 1):
        paths["test"].append(f"val/{_wordnet_id(label)}/ILSVRC2012_val_{number:08d}.JPEG")
    return paths


def _imagenet_files(splits: Mapping[str, Listed], classes: int, seed: int) -> dict[str, bytes]:
    names = (imagenet_lt.TRAIN_LIST, imagenet_lt.VAL_LIST, imagenet_lt.TEST_LIST)
    synsets = "".join(f"{_wordnet_id(label)} pattern {label:04d}\n" for label in range(classes))
    return _lists(splits, names) | {imagenet_lt.SYNSETS: synsets.encode()}


def _category(label: int, classes: int) -> str:
    """Alphabetical, like those of Places; some are nested."""
    letter = chr(ord("a") + 26 * label // classes)
    return f"{letter}_place_{label:04d}" + ("", "", "/indoor", "", "/outdoor")[label % 5]


def _places_paths(labels: Labels, classes: int, seed: int) -> dict[str, list[str]]:
    paths: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in ("train", "val"):
        for number, label in enumerate(labels[name].tolist(), len(paths["train"]) + 1):
            category = _category(label, classes)
            paths[name].append(f"data_256/{category[0]}/{category}/{number:08d}.jpg")
    paths["test"] = [f"val_256/Places365_val_{number + 1:08d}.jpg" for number in range(len(labels["test"]))]
    return paths


def _places_files(splits: Mapping[str, Listed], classes: int, seed: int) -> dict[str, bytes]:
    names = (places_lt.TRAIN_LIST, places_lt.VAL_LIST, places_lt.TEST_LIST)
    categories = [_category(label, classes) for label in range(classes)]
    lines = "".join(f"/{category[0]}/{category} {label}\n" for label, category in enumerate(categories))
    return _lists(splits, names) | {places_lt.CATEGORIES: lines.encode()}


def _lists(splits: Mapping[str, Listed], names: tuple[str, str, str]) -> dict[str, bytes]:
    files = {}
    for split, name in zip(("train", "val", "test"), names, strict=True):
        pairs = zip(splits[split].paths, splits[split].labels, strict=True)
        files[name] = "".join(f"{path} {label}\n" for path, label in pairs).encode()
    return files


def _folder_paths(labels: Labels, classes: int, seed: int) -> dict[str, list[str]]:
    folders = {"train": "train", "test": "val"}
    return {
        name: [f"{folders[name]}/pattern {label:04d}/{number:08d}.jpg" for number, label in enumerate(values.tolist())]
        for name, values in labels.items()
    }


def _no_files(splits: Mapping[str, Listed], classes: int, seed: int) -> dict[str, bytes]:
    return {}


def _table_paths(labels: Labels, classes: int, seed: int) -> dict[str, list[str]]:
    first = {"train": 0, "test": len(labels["train"])}
    return {
        name: [f"images/{number:08d}.jpg" for number in range(first[name], first[name] + len(values))]
        for name, values in labels.items()
    }


def _table_files(splits: Mapping[str, Listed], classes: int, seed: int) -> dict[str, bytes]:
    lines = ["path,label,split\n"]
    for name, split in splits.items():
        lines += [f"{path},pattern {label:04d},{name}\n" for path, label in zip(split.paths, split.labels, strict=True)]
    return {"labels.csv": "".join(lines).encode()}


LAYOUTS = {
    "inat18": Layout(500.0, 3, False, _inat18_paths, _inat18_files),
    "imagenet-lt": Layout(256.0, 50, True, _imagenet_paths, _imagenet_files),
    "places-lt": Layout(996.0, 100, True, _places_paths, _places_files),
    "imagefolder": Layout(100.0, 10, False, _folder_paths, _no_files),
    "table": Layout(100.0, 10, False, _table_paths, _table_files),
}
