"""A data set of this library from any ``torch.utils.data.Dataset`` with labels: :func:`from_dataset`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from shike_fast.data.augment.photo import photo_augmentations
from shike_fast.data.datasets.own import Classes, name_classes, number_classes
from shike_fast.data.datasets.validation import SplitOptions, build_parts, set_aside
from shike_fast.data.images.files import ImagePart
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.samples import IMAGES, TENSORS, SampleStore, TensorSource, kind_of
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from shike_fast.data.longtail import long_tail_indices
from shike_fast.data.registry import check_options, with_recipe
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, count_classes, fingerprint
from shike_fast.errors import DataError

OWN_TRANSFORM = "own"  # the augmentation of finished tensors
_LABELS = ("targets", "labels", "_labels", "y")  # attributes that hold a label a sample
_PAIRS = ("samples", "imgs", "_samples")  # those that hold a file and a label a sample


def from_dataset(
    train: Any,
    test: Any = None,
    *,
    name: str = "from_dataset",
    labels: Iterable[Any] | None = None,
    test_labels: Iterable[Any] | None = None,
    names: Iterable[str] | None = None,
    class_names: Sequence[str] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    info: DatasetInfo | None = None,
    options: LoadOptions | None = None,
    **settings: Any,
) -> LongTailData:
    """Make a long-tailed data set of PyTorch's data sets, whose samples are (image, label).

    Images of Pillow and uint8 arrays or tensors, [H, W, C], [C, H, W] or [H, W], go through the augmentations and the
    test transform of this library, as photographs in files do. float32 tensors [C, S, S] are taken as they are; while
    one is made the generators of Python, NumPy and PyTorch are seeded by (seed, epoch, index), so that random
    transforms give the same in every run and with any number of workers. An OSError of an image means that it cannot be
    read: another one takes its place.

    Args:
        train: the training samples, by index from 0.
        test: the test samples; None: some of the training samples are set aside.
        name: what the data set is called.
        labels, test_labels: the label of every sample; None: the attribute ``targets``, ``labels`` or ``samples`` has
            them, also of PyTorch's ``Subset``, ``ConcatDataset`` and ``TensorDataset``. No sample is made for that.
        names: what the training samples are called, which tells them apart from others with the same labels, and says
            which are set aside; None: the files in ``samples``, else their numbers.
        class_names: what the labels 0, 1, … mean; None: what ``train.classes`` says, else the labels themselves.
        mean, std: of the normalisation, for pixels in [0, 1]; default ImageNet's. For float tensors: those that their
            transform used, which ``predict`` needs; default 0 and 1.
        info: description, augmentations and recipe; None for those of photographs, or of small images for tensors.
        options: in a loading function (:func:`shike_fast.data.register_dataset`) those that it was given, with info.
        settings: elsewhere any of ``image_size``, ``augmentation``, ``imbalance_factor``, ``long_tail``, ``subset``,
            ``seed`` and ``strict``, as for :func:`shike_fast.data.load_dataset`; ``val_share`` and ``split_seed``.

    Returns:
        A data set for loaders and for training. Its ``info`` has augmentations and a recipe.

    Raises:
        DataError: the labels cannot be read, or a sample is of another kind; the message says what helps.
    """
    what = f"{name if info is None else info.name}: training"
    kind, shape = _probe(train, what, check_label=labels is None)
    if options is None:
        info = _info_of(name, kind) if info is None else with_recipe(info)
        info = dataclasses.replace(info, options=info.options or SplitOptions)
        options = check_options(info, **settings)
    elif settings or info is None:
        raise DataError("from_dataset: options are those of a loading function; give its info too, and no settings")
    if not isinstance(options.own, SplitOptions):
        options = dataclasses.replace(options, own=SplitOptions())
    raw, raw_test = _labels_of(train, labels, what, "labels"), []
    if test is not None:
        what = f"{info.name}: test"
        test_kind, test_shape = _probe(test, what, check_label=test_labels is None)
        if (test_kind, test_shape) != (kind, shape):
            first, second = _called(kind, shape), _called(test_kind, test_shape)
            raise DataError(f"{what} samples are {second}, training samples {first}; they must be alike")
        raw_test = _labels_of(test, test_labels, what, "test_labels")
    classes = _classes(raw, raw_test, class_names, train, info.name)
    table = _names_of(train, names, len(raw), info.name)
    if kind == TENSORS:
        return _build_tensors(info, options, train, test, classes, table, shape, mean, std)
    return build_parts(
        info,
        options,
        train=ImagePart(SampleStore(train, f"{info.name}: training sample"), classes.train),
        test=None if test is None else ImagePart(SampleStore(test, f"{info.name}: test sample"), classes.val),
        names=table,
        class_names=classes.names,
        source=info.name,
        mean=mean or IMAGENET_MEAN,
        std=std or IMAGENET_STD,
        notes=classes.notes,
    )


def _info_of(name: str, kind: str) -> DatasetInfo:
    """The description of a data set that nobody registered."""
    return with_recipe(
        DatasetInfo(
            name=name,
            description="made by from_dataset",
            how_obtained="made by from_dataset, of data sets of PyTorch",
            default_imbalance_factor=None,
            augmentations=photo_augmentations("rrc") if kind == IMAGES else (OWN_TRANSFORM,),
            resizable=kind == IMAGES,
        )
    )


def _probe(samples: Any, what: str, *, check_label: bool) -> tuple[str, tuple[int, ...]]:
    """The kind of the samples, and the shape that all have if they are tensors; the first one is made for that.

    Raises:
        DataError: these are no samples (image, label), or the label is another one than the attribute says.
    """
    if isinstance(samples, IterableDataset) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise DataError(f"{what} set: {type(samples).__name__} gives no sample by its number; use one that does")
    if len(samples) == 0:
        raise DataError(f"{what} set: holds no samples")
    sample = samples[0]
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        raise DataError(f"{what} sample 0: must be (image, label), got {type(sample).__name__}")
    kind = kind_of(sample[0], f"{what} sample 0")
    found = _attribute_labels(samples) if check_label else None
    if found is not None and found and _plain(found[0]) != _plain(sample[1]):
        raise DataError(
            f"{what} sample 0: has the label {_plain(sample[1])!r}, where the attribute of all labels says "
            f"{_plain(found[0])!r}; name the labels that samples have: labels=[...]"
        )
    return kind, tuple(sample[0].shape) if kind == TENSORS else ()


def _called(kind: str, shape: tuple[int, ...]) -> str:
    return f"{kind} {list(shape)}" if shape else kind


def _labels_of(samples: Any, given: Iterable[Any] | None, what: str, argument: str) -> list[int | str]:
    """One label a sample: whole numbers or texts."""
    found = list(given) if given is not None else _attribute_labels(samples)
    if found is None:
        raise DataError(
            f"{what} set: {type(samples).__name__} has no attribute {', '.join((*_LABELS, _PAIRS[0]))} with a label a "
            f"sample; name them: {argument}=[...], or, which makes every sample once: "
            f"{argument}=[label for _, label in dataset]"
        )
    if len(found) != len(samples):
        raise DataError(f"{what} set: {len(found):,} labels for {len(samples):,} samples")
    plain = [_plain(label) for label in found]
    kinds = {type(label) for label in plain}
    if len(kinds) > 1 or not kinds <= {int, str}:
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"{what} set: labels must all be whole numbers, or all texts, got {shown}")
    return plain


def _attribute_labels(samples: Any) -> list[Any] | None:
    """The labels that a data set keeps in an attribute; None where it keeps none."""
    if isinstance(samples, Subset):
        inner = _attribute_labels(samples.dataset)
        return None if inner is None else [inner[i] for i in samples.indices]
    if isinstance(samples, ConcatDataset):
        parts = [_attribute_labels(part) for part in samples.datasets]
        return None if None in parts else [label for part in parts for label in part or ()]
    if isinstance(samples, TensorDataset):
        return samples.tensors[1].tolist() if len(samples.tensors) > 1 else None
    for name in _LABELS:
        found: Any = getattr(samples, name, None)
        if isinstance(found, list | tuple) or hasattr(found, "tolist"):
            return list(found)
    pairs = _pairs(samples)
    return None if pairs is None else [label for _, label in pairs]


def _pairs(samples: Any) -> list[tuple[str, Any]] | None:
    for name in _PAIRS:
        found = getattr(samples, name, None)
        if isinstance(found, list) and found and isinstance(found[0], tuple) and len(found[0]) == 2:
            return found
    return None


def _plain(label: Any) -> Any:
    """A label as Python has it: an int or a str, where it is one."""
    label = label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label
    return int(label) if isinstance(label, bool) else label


def _classes(train: list[Any], test: list[Any], names: Sequence[str] | None, samples: Any, source: str) -> Classes:
    if isinstance(train[0], str) != isinstance((test or train)[0], str):
        raise DataError(f"{source}: labels of training are {type(train[0]).__name__}, of test {type(test[0]).__name__}")
    known = list(names if names is not None else _known_classes(samples))
    if isinstance(train[0], str):
        if names is None:
            return number_classes(train, test, source)
        ids = {name: number for number, name in enumerate(known)}
        if unknown := sorted({*train, *test} - ids.keys()):
            raise DataError(f"{source}: class_names has no {unknown[0]!r}, which is a label")
        train, test = ([ids[label] for label in part] for part in (train, test))
    outside = [label for label in (*train, *test) if not 0 <= label < len(known)]
    if not outside:
        return name_classes(np.array(train, dtype=np.int64), np.array(test, dtype=np.int64), known, source)
    if names is not None:
        raise DataError(f"{source}: label {outside[0]} is outside the {len(known)} class_names, 0 to {len(known) - 1}")
    return number_classes(list(map(str, train)), list(map(str, test)), source)


def _known_classes(samples: Any) -> Sequence[str]:
    """What a data set calls its classes; nothing where it does not say it."""
    if isinstance(samples, Subset):
        return _known_classes(samples.dataset)
    found = getattr(samples, "classes", ())
    return [str(name) for name in found] if isinstance(found, list | tuple) else ()


def _names_of(samples: Any, given: Iterable[str] | None, count: int, source: str) -> PathTable:
    found = list(given) if given is not None else _attribute_names(samples) or list(map(str, range(count)))
    if len(found) != count:
        raise DataError(f"{source}: {len(found):,} names for {count:,} training samples")
    return PathTable(found)


def _attribute_names(samples: Any) -> list[str] | None:
    if isinstance(samples, Subset):
        inner = _attribute_names(samples.dataset)
        return None if inner is None else [inner[i] for i in samples.indices]
    pairs = _pairs(samples)
    if pairs is None or not all(isinstance(file, str) for file, _ in pairs):
        return None
    root = getattr(samples, "root", None)
    return [os.path.relpath(file, root) if isinstance(root, str | os.PathLike) else file for file, _ in pairs]


def _build_tensors(
    info: DatasetInfo,
    options: LoadOptions,
    train: Any,
    test: Any,
    classes: Classes,
    names: PathTable,
    shape: tuple[int, ...],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> LongTailData:
    """The data set of finished tensors."""
    kept, labels, validation = np.arange(len(classes.train)), classes.train, None
    test_kept, test_labels = np.arange(len(classes.val)), classes.val
    if test is None:
        called = list(map(names.raw, range(len(names))))
        kept, test_kept, validation = set_aside(labels, called, options.own, info.name)
        test, labels, test_labels = train, labels[kept], labels[test_kept]
    elif options.own.val_share is not None:
        raise DataError(f"val_share: {info.name} has a test set; leave it out")
    identity = names.take(kept).arrays
    if options.imbalance_factor is not None:
        settings = (options.imbalance_factor, options.subset, options.long_tail)
        chosen = long_tail_indices(labels, len(classes.names), *settings)
        kept, labels = kept[chosen], labels[chosen]

    def source(samples: Any, kept: Any, labels: Any, part: str) -> TensorSource:
        return TensorSource(samples, kept, labels, shape=shape, name=f"{info.name}: {part} sample", seed=options.seed)

    return LongTailData(
        name=info.name,
        train=source(train, kept, labels, "training"),
        test=source(test, test_kept, test_labels, "test"),
        class_names=classes.names,
        class_counts=count_classes(labels, len(classes.names)),
        in_channels=shape[0],
        image_size=shape[1],
        mean=mean or (0.0,) * shape[0],
        std=std or (1.0,) * shape[0],
        imbalance_factor=options.imbalance_factor,
        augmentation=OWN_TRANSFORM,
        fingerprint=fingerprint(*identity, labels),
        info=info,
        validation=validation,
        notes=classes.notes,
    )
