"""Images that are there more than once, in files, in other stores and in memory."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from shike_fast.data import build_arrays, datasets, load_dataset
from shike_fast.data.description import duplicates
from shike_fast.data.description.duplicates import find_duplicates
from shike_fast.data.images.decode import BrokenImageError, RawPicture
from shike_fast.data.types import LoadOptions
from shike_fast.errors import RunError


def load(image_dir, **options):
    return load_dataset("imagefolder", data_dir=image_dir, **options)


def copy(image_dir, source, target):
    (image_dir / target).write_bytes((image_dir / source).read_bytes())


def names(groups, image_dir):
    return [[os.path.relpath(one.name, image_dir) for one in group] for group in groups]


def test_no_two_images_are_the_same(image_dir):
    found = find_duplicates(load(image_dir))
    assert (found.groups, found.unreadable, found.superfluous, found.leaked) == ((), 0, 0, 0)


def test_copies_within_training_across_the_parts_and_with_other_labels(image_dir):
    copy(image_dir, "train/cat/0.jpg", "train/cat/again.jpg")
    copy(image_dir, "train/cat/0.jpg", "val/dog/seen.jpg")
    copy(image_dir, "val/eel/0.jpg", "val/eel/twice.jpg")
    found = find_duplicates(load(image_dir))
    assert names(found.groups, image_dir) == [
        ["train/cat/0.jpg", "train/cat/again.jpg", "val/dog/seen.jpg"],
        ["val/eel/0.jpg", "val/eel/twice.jpg"],
    ]
    first = found.groups[0]
    assert [(one.part, one.index, one.label) for one in first] == [
        ("training", 0, 0),
        ("training", 6, 0),
        ("test", 4, 1),
    ]
    assert (found.superfluous, found.leaked, found.unreadable) == (2, 1, 0)
    assert found.contradictory == found.leaking == found.groups[:1]
    assert found.repeated == found.groups


def test_files_of_one_size_and_end_that_differ_before_it_are_no_copies(image_dir):
    plain = Image.fromarray(np.zeros((60, 60, 3), np.uint8))
    for name, pixel in (("a", 0), ("b", 1), ("c", 1)):
        plain.putpixel((0, 59), (pixel, 0, 0))  # BMP begins at the bottom
        plain.save(image_dir / "train" / "cat" / f"{name}.bmp")
    found = find_duplicates(load(image_dir))
    assert names(found.groups, image_dir) == [["train/cat/b.bmp", "train/cat/c.bmp"]]


def test_only_files_of_one_size_are_opened(image_dir, monkeypatch):
    copy(image_dir, "train/cat/0.jpg", "val/cat/same.jpg")
    opened = []
    plain = duplicates.open_regular
    monkeypatch.setattr(duplicates, "open_regular", lambda path: (opened.append(path), plain(path))[1])
    sizes = [path.stat().st_size for path in image_dir.rglob("*.*")]
    assert find_duplicates(load(image_dir)).leaked == 1
    assert len(opened) == sum(sizes.count(size) > 1 for size in sizes) + 2


def test_a_subset_of_files_is_compared_by_its_own_numbers(image_dir):
    copy(image_dir, "train/cat/0.jpg", "val/cat/same.jpg")
    data = load(image_dir, imbalance_factor=3)
    found = find_duplicates(data)
    assert names(found.groups, image_dir) == [["train/cat/0.jpg", "val/cat/same.jpg"]]
    assert len(data.train) < 12


def test_names_of_any_bytes(image_dir):
    name = os.fsdecode(b"caf\xe9.jpg")
    copy(image_dir, "train/cat/0.jpg", f"train/dog/{name}")
    assert names(find_duplicates(load(image_dir)).groups, image_dir) == [["train/cat/0.jpg", f"train/dog/{name}"]]


def test_files_that_cannot_be_compared_are_counted(image_dir):
    for name in ("a", "b"):
        (image_dir / "train" / "cat" / f"{name}.jpg").write_bytes(b"")
        (image_dir / "train" / "cat" / f"lost {name}.jpg").symlink_to(image_dir / "gone.jpg")
    found = find_duplicates(load(image_dir))
    assert (found.groups, found.unreadable) == ((), 4)


def test_a_file_that_vanishes_meanwhile_is_counted(image_dir, monkeypatch):
    copy(image_dir, "train/cat/0.jpg", "train/dog/same.jpg")
    plain = duplicates.open_regular
    monkeypatch.setattr(duplicates, "open_regular", lambda path: plain(f"{path}.gone"))
    found = find_duplicates(load(image_dir))
    assert found.groups == () and found.unreadable >= 2


def test_a_system_that_lacks_something_is_no_unreadable_image(image_dir, monkeypatch):
    def lack(path):
        raise OSError(errno.EMFILE, "Too many open files")

    copy(image_dir, "train/cat/0.jpg", "train/dog/same.jpg")
    monkeypatch.setattr(duplicates, "open_regular", lack)
    with pytest.raises(RunError, match="cannot compare images"):
        find_duplicates(load(image_dir))


class Kept:
    """A store of encoded images or of pixels, of which one is damaged and one is empty."""

    def __init__(self, images, raw):
        self.images, self.raw = images, raw

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"member {index}"

    def read(self, index):
        if index == 1:
            raise BrokenImageError("is damaged")
        return None if self.raw else (b"" if index == 2 else bytes(self.images[index]))

    def open(self, index):
        return RawPicture(np.frombuffer(bytes(self.images[index]), np.uint8).reshape(1, -1, 3))


@pytest.mark.parametrize("raw", [False, True])
def test_other_stores(image_dir, raw):
    data = load(image_dir)
    images = [np.full(3, i, np.uint8) for i in range(12)]
    images[7] = images[3]
    data.train.store = Kept(images, raw)
    data.test.store = Kept([images[i] for i in (5, 0, 0, 0, 0, 6)], raw)
    found = find_duplicates(data)
    numbers = [[(one.part, one.index, one.name) for one in group] for group in found.groups]
    inside = [0, 3, 4] if not raw else [0, 2, 3, 4]
    expected = [
        [("training", 0, "member 0"), *(("test", i, f"member {i}") for i in inside if i > 1)],
        [("training", 3, "member 3"), ("training", 7, "member 7")],
        [("training", 5, "member 5"), ("test", 0, "member 0")],
        [("training", 6, "member 6"), ("test", 5, "member 5")],
    ]
    assert numbers == expected
    assert found.unreadable == (2 if raw else 4)


def test_images_in_memory():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(2, 2).repeat(2, 3)
    labels = np.array([0, 0, 0, 1, 1, 1])
    info = datasets()["digits-lt"]
    options = LoadOptions(None, None, "none", False, True, 0, None)
    again = np.concatenate([images[:1], images[:1] + 100]), np.array([1, 0])
    train = np.concatenate([images, images[4:5]]), np.append(labels, 1)
    norm = {"class_names": ("a", "b"), "mean": (0.5,), "std": (0.5,)}
    found = find_duplicates(build_arrays(info, options, train=train, test=again, **norm))
    assert [[one.name for one in group] for group in found.groups] == [
        ["training image 0", "test image 0"],
        ["training image 4", "training image 6"],
    ]
    assert len(found.contradictory) == 1 and found.superfluous == 1


class Any:
    """Samples of a program's own kind."""

    wants_workers, seed = False, 0
    labels = np.array([0, 1])

    def __len__(self):
        return 2


def test_samples_of_an_unknown_kind_cannot_be_compared(image_dir):
    data = load(image_dir)
    object.__setattr__(data, "test", Any())
    assert find_duplicates(data) is None
