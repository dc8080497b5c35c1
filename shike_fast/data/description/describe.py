"""A data set's imbalance, classes and files, described: :func:`describe`."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from shike_fast.data.description.advice import advise
from shike_fast.data.description.duplicates import Duplicates, find_duplicates
from shike_fast.data.description.names import similar_names
from shike_fast.data.description.sizes import ClassSizes, ShotBands, suggest_bands
from shike_fast.data.description.unnamed import UnnamedFiles, find_unnamed
from shike_fast.data.types import LongTailData
from shike_fast.errors import DataError

FINDINGS = {
    "leakage": "test images that are training images as well",
    "contradictions": "images that are there with different labels",
    "duplicates": "superfluous copies within training or within the test",
    "one-sided": "classes without training or without test images",
    "single": "classes with one training image",
    "names": "class names that differ by case or spaces alone",
    "unlabelled": "image files that the data set does not name",
}
"""What may be wrong with a data set, by the names of ``--fail-on``."""


@dataclass(frozen=True)
class Description:
    """What :func:`describe` finds. Classes are numbers, as labels are.

    Attributes:
        name: of the data set.
        class_names: one name a class.
        train_counts, test_counts: images of each class.
        sizes: figures of the classes that have training images.
        suggested_bands: thresholds of shots by terciles, where the field's put all classes in one band; else None.
        training_only: classes without test images.
        test_only: classes without training images.
        absent: classes without any image.
        single: classes with one training image.
        similar_names: groups of classes whose names differ by case or spaces alone, or not at all.
        duplicates: images with the same content; None where they were not looked for, or cannot be compared.
        unnamed: files that no image of the data set is; None where they were not looked for, or there are no files.
    """

    name: str
    class_names: tuple[str, ...]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    sizes: ClassSizes
    suggested_bands: ShotBands | None
    training_only: tuple[int, ...]
    test_only: tuple[int, ...]
    absent: tuple[int, ...]
    single: tuple[int, ...]
    similar_names: tuple[tuple[int, ...], ...]
    duplicates: Duplicates | None
    unnamed: UnnamedFiles | None

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about it, a sentence each."""
        return advise(self)

    @property
    def sized(self) -> list[int]:
        """The sizes of the classes that have training images, largest first."""
        return sorted((count for count in self.train_counts if count), reverse=True)

    @property
    def by_size(self) -> list[int]:
        """The classes, the largest first; of equals the lower number first."""
        return sorted(range(len(self.train_counts)), key=lambda label: -self.train_counts[label])

    @property
    def findings(self) -> dict[str, int | None]:
        """How many there are of each of :data:`FINDINGS`; None where they were not looked for, or cannot be found."""
        duplicates, unnamed = self.duplicates, self.unnamed
        return {
            "leakage": None if duplicates is None else duplicates.leaked,
            "contradictions": None if duplicates is None else len(duplicates.contradictory),
            "duplicates": None if duplicates is None else duplicates.superfluous,
            "one-sided": len(self.training_only) + len(self.test_only) + len(self.absent),
            "single": len(self.single),
            "names": len(self.similar_names),
            "unlabelled": None if unnamed is None else unnamed.images,
        }


def describe(
    dataset: LongTailData,
    *,
    data_dir: str | PathLike[str] | None = None,
    duplicates: bool = True,
    files: bool = True,
) -> Description:
    """Describe a data set: class sizes, shots, classes on one side, duplicate and unlabelled images, and what to do.

    Args:
        dataset: of :func:`shike_fast.data.load_dataset`, or one of your own.
        data_dir: below which to look for files that it does not name; None: the folder that all its files are in.
        duplicates: compare the images, which may have to be read for that.
        files: list the files below ``data_dir``.

    Raises:
        DataError: no class has a training image, or a label is no class.
    """
    classes = dataset.num_classes
    counts = {}
    for part, source in (("training", dataset.train), ("test", dataset.test)):
        labels = np.asarray(source.labels)
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DataError(f"{dataset.name}: {part} label {wrong} is outside 0 … {classes - 1}")
        counts[part] = tuple(np.bincount(labels, minlength=classes).tolist())
    train, test = counts["training"], counts["test"]
    if not any(train):
        raise DataError(f"{dataset.name}: there are no training images")
    has = [(bool(train[label]), bool(test[label])) for label in range(classes)]
    return Description(
        name=dataset.name,
        class_names=dataset.class_names,
        train_counts=train,
        test_counts=test,
        sizes=ClassSizes.of(train),
        suggested_bands=suggest_bands(train),
        training_only=tuple(label for label in range(classes) if has[label] == (True, False)),
        test_only=tuple(label for label in range(classes) if has[label] == (False, True)),
        absent=tuple(label for label in range(classes) if has[label] == (False, False)),
        single=tuple(label for label in range(classes) if train[label] == 1),
        similar_names=similar_names(dataset.class_names),
        duplicates=find_duplicates(dataset) if duplicates else None,
        unnamed=find_unnamed(dataset, None if data_dir is None else Path(data_dir)) if files else None,
    )
