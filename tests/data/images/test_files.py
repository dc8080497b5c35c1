"""Images of files as samples: windows, what stands for a broken one, what a long-tail subset keeps."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast.data import load_dataset
from shike_fast.data.images.decode import BrokenImageError, open_image
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore, Subset
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from shike_fast.errors import RunError


def load(root, **options):
    return load_dataset("imagefolder", data_dir=root, **{"image_size": 32, **options})


def pixels_of(dataset, *indices, epoch=0):
    return dataset.pixels(np.array(indices), seed=0, epoch=epoch)


def break_file(root, name, content=b"no image"):
    path = root / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_system_lacks_is_no_broken_image(image_dir, monkeypatch, number):
    def refuse(path, flags):
        raise OSError(number, os.strerror(number), path)

    train = load(image_dir).train
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match=rf"cannot read images \({os.strerror(number)}\); .*--workers") as found:
        pixels_of(train, 0)
    assert ".jpg" not in str(found.value)


def test_pixels_then_augmentation_then_normalisation_make_a_batch(image_dir):
    train = load(image_dir).train
    found = pixels_of(train, 3, 8)
    assert found.pixels.dtype == torch.uint8 and found.pixels.shape == (2, 3, 32, 32)
    assert found.pixels.is_contiguous(memory_format=torch.channels_last)
    images = train.normalised(train.augmented(replace(found, pixels=found.pixels.clone()), seed=0, epoch=0))
    expected, labels = train.batch(np.array([3, 8]), seed=0, epoch=0)
    assert torch.equal(images, expected) and torch.equal(labels, found.labels)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_large_image_is_decoded_at_a_smaller_size_and_looks_the_same(tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((1400, 1000))
    smooth.save(tmp_path / "x.jpg", quality=95)
    smooth.save(tmp_path / "x.png")
    settings = {"augmentation": "rrc", "size": 64, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    jpeg, png = (
        ImageDataset(FileStore(tmp_path, PathTable([name])), np.zeros(1, np.int64), **settings)
        for name in ("x.jpg", "x.png")
    )
    for epoch in range(8):
        one, other = (pixels_of(dataset, 0, epoch=epoch).pixels.int() for dataset in (jpeg, png))
        assert (one - other).abs().float().mean() < 2.5


@pytest.mark.parametrize("shape", [(20_000, 10), (10, 20_000), (1, 1), (1, 500)])
def test_strips_and_dots(tmp_path, shape):
    Image.new("RGB", shape, (9, 99, 199)).save(tmp_path / "x.png")
    store = FileStore(tmp_path, PathTable(["x.png"]))
    for augmentation in ("none", "rrc"):
        dataset = ImageDataset(
            store, np.zeros(1, np.int64), augmentation=augmentation, size=16, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
        found = pixels_of(dataset, 0).pixels
        assert torch.equal(found, torch.tensor([9, 99, 199], dtype=torch.uint8)[None, :, None, None].expand_as(found))


def test_a_broken_training_image_is_replaced_by_the_next_readable_one(image_dir):
    train = load(image_dir).train
    paths = [break_file(image_dir, f"train/cat/{name}") for name in ("5.JPEG", "4.png")]
    found = pixels_of(train, 0, 4, 6)
    assert found.labels.tolist() == [0, 1, 1]  # 4 and 5 are cats; the first dog stands for 4, with its label
    assert [broken.index for broken in found.broken] == [4, 5]
    assert str(paths[1]) in found.broken[0].message and "cannot be decoded as an image" in found.broken[0].message
    assert not torch.equal(found.pixels[1], found.pixels[2])  # the same image, in another window
    (again,) = pixels_of(train, 4).pixels
    assert torch.equal(again, found.pixels[1])


def test_training_images_are_replaced_even_if_they_are_treated_like_test_images(image_dir, capsys):
    train = load(image_dir, augmentation="none").train
    path = break_file(image_dir, "train/cat/5.JPEG", b"")
    assert pixels_of(train, 5, 6).labels.tolist() == [1, 1]
    for _ in range(2):  # told once, by whoever has no loader to tell it
        images, labels = train.batch(np.array([5, 6]), seed=0, epoch=0)
        assert torch.equal(images[0], images[1]) and labels.tolist() == [1, 1]
    assert capsys.readouterr().err == f"warning: {path}: is empty; another image stands in for it\n"


def test_after_the_last_image_comes_the_first(image_dir):
    break_file(image_dir, "train/eel/1.png")
    train = load(image_dir).train
    assert pixels_of(train, 11).labels.tolist() == [0]


def test_a_broken_test_image_is_grey_and_keeps_its_label(image_dir):
    test = load(image_dir).test
    path = break_file(image_dir, "val/dog/0.jpg", b"")
    found = pixels_of(test, 2, 3)
    assert found.labels.tolist() == [1, 1]
    assert [broken.message for broken in found.broken] == [f"{path}: is empty"]
    images, _ = test.batch(np.array([2]), seed=0, epoch=0)
    assert images.abs().max() < 0.02  # the mean colour


def test_strict_stops_at_a_broken_image(image_dir, data_error):
    path = break_file(image_dir, "train/cat/0.jpg")
    with data_error(f"{path}: cannot be decoded as an image", "replace or remove it"):
        pixels_of(load(image_dir, strict=True).train, 0)


def test_a_folder_that_has_gone_is_not_searched_for_ever(image_dir, data_error):
    train = load(image_dir).train
    (image_dir / "train").rename(image_dir / "elsewhere")
    with data_error("12 in a row", "check --data-dir"):
        pixels_of(train, 3)


@pytest.mark.timeout(20)
def test_pipes_devices_and_folders_are_broken_and_nobody_waits_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(2**31)  # a hole: it takes no space
    reasons = ["is no regular file", "is no regular file", "Is a directory", "has 2,147,483,648 bytes"]
    names = ["pipe.jpg", "zero.jpg", "folder.jpg", "huge.jpg"]
    store = FileStore(tmp_path, PathTable(names))
    for index, reason in enumerate(reasons):
        with pytest.raises(BrokenImageError, match=reason):
            store.read(index)


def test_a_name_that_is_not_utf_8_is_read_and_told(tmp_path):
    name = b"caf\xe9.jpg"
    with open(bytes(tmp_path) + b"/" + name, "wb") as file:
        Image.new("RGB", (20, 20), (1, 2, 3)).save(file, "PNG")
    store = FileStore(tmp_path, PathTable([name, b"gone\xff.jpg"]))
    assert store.open(0).pixels()[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(BrokenImageError, match="cannot be read"):
        store.open(1)
    assert store.name(1).encode("utf-8", "surrogateescape").endswith(b"gone\xff.jpg")


def test_stores_follow_the_protocol_and_a_subset_renumbers(image_dir):
    store = load(image_dir).train.store
    part = Subset(store, np.array([7, 2]))
    assert len(part) == 2 and part.name(0) == store.name(7) and part.read(1) == store.read(2)
    np.testing.assert_array_equal(part.open(0).pixels(), open_image(store.read(7)).pixels())


def test_path_tables_from_bytes_strings_and_arrays():
    table = PathTable(["a/b.jpg", b"\xff\xfe", ""])
    assert [table.raw(i) for i in range(3)] == [b"a/b.jpg", b"\xff\xfe", b""]
    again = PathTable.from_arrays(*table.arrays)
    assert [again[i] for i in range(3)] == [table[i] for i in range(3)]
    taken = table.take(np.array([2, 0, 0, 1]))
    assert [taken.raw(i) for i in range(4)] == [b"", b"a/b.jpg", b"a/b.jpg", b"\xff\xfe"]
    assert len(table.take(np.empty(0, np.int64))) == 0
