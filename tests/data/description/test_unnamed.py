"""Files below the folder of a data set that it does not name."""

import os

import numpy as np
from PIL import Image

from shike_fast.data import load_dataset
from shike_fast.data.description.unnamed import MOST_NAMED, find_unnamed


def find(image_dir, folder=None, **options):
    return find_unnamed(load_dataset("imagefolder", data_dir=image_dir, **options), folder)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "JPEG")


def test_all_files_are_named(image_dir):
    found = find(image_dir)
    assert (found.folder, found.images, found.others, found.closed) == (str(image_dir), 0, 0, ())


def test_images_outside_of_class_folders(image_dir):
    for name in ("root.JPG", "train/loose.jpg", "train/second.png", "other/deep/x.jpeg"):
        picture(image_dir / name)
    found = find(image_dir)
    assert found.images == 4
    assert found.image_names == ("root.JPG", "other/deep/x.jpeg", "train/loose.jpg", "train/second.png")
    assert found.image_folders == {"train": 2, ".": 1, "other": 1}


def test_files_that_are_no_images(image_dir):
    for name in ("notes.TXT", "train/cat/readme.txt", "val/dog/photo.heic", "LICENSE"):
        (image_dir / name).write_bytes(b"x")
    found = find(image_dir)
    assert (found.images, found.others) == (0, 4)
    assert found.other_names == ("LICENSE", "notes.TXT", "train/cat/readme.txt", "val/dog/photo.heic")
    assert found.other_endings == {".txt": 2, "": 1, ".heic": 1}


def test_what_systems_leave_is_passed_over(image_dir):
    for name in (".DS_Store", "train/.DS_Store", "train/cat/Thumbs.db", "thumbs.DB", ".cache/x.jpg", "train/._x.jpg"):
        path = image_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = find(image_dir)
    assert (found.images, found.others) == (0, 0)


def test_only_the_first_are_kept_by_name(image_dir):
    for i in range(MOST_NAMED + 5):
        picture(image_dir / f"{i:03d}.jpg")
    found = find(image_dir)
    assert found.images == MOST_NAMED + 5
    assert found.image_names == tuple(f"{i:03d}.jpg" for i in range(MOST_NAMED))


def test_a_subset_names_the_images_that_it_was_taken_from(image_dir):
    assert find(image_dir, imbalance_factor=3).images == 0


def test_names_of_any_bytes(image_dir):
    name = os.fsdecode(b"caf\xe9.jpg")
    picture(image_dir / name)
    picture(image_dir / "train" / "cat" / name)
    assert find(image_dir).image_names == (name,)


def test_relative_folders_are_the_same_place(image_dir, monkeypatch):
    monkeypatch.chdir(image_dir / "train")
    picture(image_dir / "train" / "loose.jpg")
    found = find_unnamed(load_dataset("imagefolder", data_dir=".."), os.path.relpath(image_dir))
    assert (found.folder, found.image_names) == (str(image_dir), ("train/loose.jpg",))


def test_a_folder_called_by_way_of_a_link(image_dir, tmp_path):
    (tmp_path / "link").symlink_to(image_dir)
    picture(image_dir / "loose.jpg")
    for root, folder in ((image_dir, tmp_path / "link"), (tmp_path / "link", image_dir)):
        found = find_unnamed(load_dataset("imagefolder", data_dir=root), folder)
        assert (found.folder, found.image_names) == (str(image_dir), ("loose.jpg",))


def test_links_to_folders_are_not_followed(image_dir, tmp_path):
    picture(tmp_path / "elsewhere" / "x.jpg")
    (image_dir / "elsewhere").symlink_to(tmp_path / "elsewhere")
    assert find(image_dir).images == 0


def test_lists(tmp_path):
    for name in ("train/n00000000/0.JPEG", "train/n00000001/0.JPEG", "val/0.JPEG", "train/n00000001/unlisted.JPEG"):
        picture(tmp_path / name)
    (tmp_path / "ImageNet_LT_train.txt").write_text("train/n00000000/0.JPEG 0\ntrain/n00000001/0.JPEG 1\n")
    (tmp_path / "ImageNet_LT_test.txt").write_text("val/0.JPEG 0\nval/0.JPEG 1\n")
    found = find_unnamed(load_dataset("imagenet-lt", data_dir=tmp_path, verify=False), tmp_path)
    assert found.image_names == ("train/n00000001/unlisted.JPEG",)
    assert found.other_endings == {".txt": 2}


def test_a_folder_that_cannot_be_listed_is_named(image_dir, monkeypatch):
    picture(image_dir / "closed" / "x.jpg")
    plain = os.scandir

    def scandir(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return plain(path)

    data = load_dataset("imagefolder", data_dir=image_dir)
    monkeypatch.setattr(os, "scandir", scandir)
    found = find_unnamed(data, None)
    assert (found.images, found.closed) == (0, ("closed",))


def test_there_are_no_files_in_memory():
    assert find_unnamed(load_dataset("digits-lt"), None) is None


def test_one_part_in_files(image_dir):
    data = load_dataset("imagefolder", data_dir=image_dir)
    data.test.store = np.zeros(6)  # any other store
    assert find_unnamed(data, None).images == 6
