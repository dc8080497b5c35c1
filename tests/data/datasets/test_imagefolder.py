import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast.data import BatchSource, load_dataset
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD


def load(root, **options):
    return load_dataset("imagefolder", data_dir=root, **{"image_size": 32, **options})


def path_of(dataset, root, index):
    return os.path.relpath(dataset.store.name(index), root)


def test_classes_counts_and_files(image_dir):
    data = load(image_dir)
    assert data.class_names == ("cat", "dog", "eel")
    assert data.class_counts.tolist() == [6, 4, 2]
    assert data.imbalance_factor is None
    assert data.train.wants_workers
    assert isinstance(data.train, BatchSource)
    assert (data.in_channels, data.image_size, data.augmentation) == (3, 32, "rrc")
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    names = [path_of(data.train, image_dir, i) for i in (0, 2, 11)]
    assert names == ["train/cat/0.jpg", "train/cat/2.JPEG", "train/eel/1.png"]


def test_the_default_size_is_224(image_dir):
    data = load_dataset("imagefolder", data_dir=image_dir)
    assert data.image_size == 224
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 224, 224)


def test_the_test_transform_and_normalisation(image_dir):
    data = load(image_dir, augmentation="none")
    with Image.open(image_dir / "val" / "dog" / "1.png") as image:
        width, height = image.size
        scale = 37 / min(width, height)  # 32 · 256/224
        resized = image.convert("RGB").resize(
            (max(37, int(width * scale)), max(37, int(height * scale))), Image.Resampling.BILINEAR
        )
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32))) / 255
    expected = ((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    found, label = data.test[3]
    assert label == 1
    np.testing.assert_allclose(found.numpy(), expected, atol=1.01 / 255 / min(IMAGENET_STD))  # one grey level
    # The augmentation "none" shows the training images like test images.
    shutil.copy(image_dir / "val" / "dog" / "1.png", image_dir / "train" / "cat" / "0.jpg")
    assert torch.equal(load(image_dir, augmentation="none").train[0][0], found)


@pytest.mark.parametrize("augmentation", ["rrc", "rrc-jitter"])
def test_augmented_samples_depend_on_seed_epoch_and_index_alone(image_dir, augmentation):
    data = load(image_dir, augmentation=augmentation, seed=3)
    images, labels = data.train.batch(np.array([7, 1, 7]), seed=3, epoch=0)
    assert images.dtype == torch.float32
    assert labels.tolist() == [1, 0, 1]
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], data.train[1][0])
    assert not torch.equal(images, data.train.batch(np.array([7, 1, 7]), seed=3, epoch=1)[0])
    assert not torch.equal(images, data.train.batch(np.array([7, 1, 7]), seed=4, epoch=0)[0])
    with pytest.raises(IndexError):
        data.train[12]


def test_jitter_changes_the_colours(image_dir):
    plain, jittered = (load(image_dir, augmentation=a).train[0][0] for a in ("rrc", "rrc-jitter"))
    assert not torch.allclose(plain, jittered, atol=0.05)


def test_long_tail_subset_of_a_folder(image_dir):
    data = load(image_dir, imbalance_factor=3)  # the formula gives 6, 3, 2
    assert data.class_counts.tolist() == [6, 3, 2]
    names = [path_of(data.train, image_dir, i) for i in (6, 8, 9)]
    assert names == ["train/dog/0.jpg", "train/dog/2.JPEG", "train/eel/0.jpg"]
    assert data.fingerprint != load(image_dir).fingerprint


def test_test_serves_where_there_is_no_val(image_dir):
    expected = load(image_dir).test[0][0]
    (image_dir / "val").rename(image_dir / "test")
    assert torch.equal(load(image_dir).test[0][0], expected)


def test_val_goes_before_test(image_dir):
    shutil.copytree(image_dir / "val", image_dir / "test")
    (image_dir / "test" / "cat" / "0.jpg").unlink()
    assert len(load(image_dir).test) == 6


def test_the_fingerprint_is_the_training_files(image_dir):
    before = load(image_dir).fingerprint
    assert load(image_dir, augmentation="none", image_size=48).fingerprint == before
    (image_dir / "val" / "cat" / "0.jpg").unlink()
    assert load(image_dir).fingerprint == before
    path = image_dir / "train" / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    changed = load(image_dir).fingerprint
    path.rename(path.with_name("00.jpg"))
    assert len({before, changed, load(image_dir).fingerprint}) == 3


def test_hidden_folders_are_passed_over(image_dir):
    """Jupyter copies what it opens into one beside it."""
    before = load(image_dir)
    for part in ("train", "val"):
        for name in ("cat/.ipynb_checkpoints", "cat/deeper/.thumbnails/large", ".Trash/cat"):
            folder = image_dir / part / name
            folder.mkdir(parents=True)
            shutil.copy(image_dir / part / "cat" / "0.jpg", folder / "0-checkpoint.jpg")
    after = load(image_dir)
    assert after.class_counts.tolist() == before.class_counts.tolist() == [6, 4, 2]
    assert after.test.labels.tolist() == before.test.labels.tolist()
    assert after.fingerprint == before.fingerprint


def test_only_names_below_the_folder_count_as_hidden(image_dir):
    hidden = image_dir.rename(image_dir.with_name(".photos"))
    assert load(hidden).class_counts.tolist() == [6, 4, 2]


def test_other_files_and_hidden_names_are_ignored(image_dir):
    before = load(image_dir).fingerprint
    (image_dir / "train" / "notes.txt").write_text("x")
    (image_dir / "train" / "cat" / "labels.csv").write_text("x")
    (image_dir / "train" / "cat" / "._0.jpg").write_bytes(b"macOS")
    (image_dir / "train" / ".ipynb_checkpoints").mkdir()
    assert load(image_dir).fingerprint == before


def test_images_in_subfolders_and_behind_a_linked_class_folder(image_dir):
    deep = image_dir / "train" / "eel" / "river" / "2020"
    deep.mkdir(parents=True)
    shutil.copy(image_dir / "train" / "eel" / "0.jpg", deep / "z.jpg")
    (image_dir / "train" / "dog").rename(image_dir / "dogs")
    (image_dir / "train" / "dog").symlink_to(image_dir / "dogs")
    data = load(image_dir)
    assert data.class_counts.tolist() == [6, 4, 3]
    assert path_of(data.train, image_dir, 12) == "train/eel/river/2020/z.jpg"
    assert data.train[7][1] == 1


def test_names_that_are_not_utf_8(image_dir):
    name = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(image_dir / "train" / "cat" / "0.jpg", image_dir / "train" / "cat" / name)
    data = load(image_dir)
    index = [path_of(data.train, image_dir, i) for i in range(7)].index(f"train/cat/{name}")
    assert data.train[index][1] == 0
    assert len(data.fingerprint) == 64


@pytest.mark.parametrize("name", ["a b.jpg", ' "a",.JPG', "a\tb.jpeg", "a\nb.jpg", "\u00e4 \u2603.png"])
def test_odd_names(image_dir, name):
    (image_dir / "train" / "cat" / "0.jpg").rename(image_dir / "train" / "cat" / name)
    data = load(image_dir, strict=True)
    assert data.class_counts.tolist() == [6, 4, 2]
    assert f"train/cat/{name}" in [path_of(data.train, image_dir, i) for i in range(6)]
    data.train.batch(np.arange(6), seed=0, epoch=0)


def test_no_train_folder(image_dir, data_error):
    (image_dir / "train").rename(image_dir / "training")
    with data_error(f"no folder {image_dir / 'train'}", "train/CLASS"):
        load(image_dir)


def test_without_val_and_test_some_of_each_class_are_set_aside(image_dir, data_error):
    with data_error("--val-share:", "has validation images"):
        load(image_dir, val_share=0.5)
    shutil.rmtree(image_dir / "val")
    data = load(image_dir)
    assert (data.class_counts.tolist(), data.test.labels.tolist()) == ([5, 3, 1], [0, 1, 2])
    assert data.validation.sentence == (
        "no validation images: 3 of 12 images set aside (--val-share 0.1 of each class, --split-seed 0)"
    )
    assert [os.fsencode(path_of(data.test, image_dir, i)) for i in range(3)] == list(data.validation.names)
    files = {path_of(part, image_dir, i) for part in (data.train, data.test) for i in range(len(part))}
    assert len(files) == 12
    others = [load(image_dir, **options) for options in ({"val_share": 0.5}, {"split_seed": 1})]
    assert others[0].class_counts.tolist() == [3, 2, 1]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert load(image_dir, seed=5).validation == data.validation


def test_all_images_in_class_folders(image_dir):
    expected = load(image_dir)
    shutil.rmtree(image_dir / "val")
    for folder in (image_dir / "train").iterdir():
        folder.rename(image_dir / folder.name)
    (image_dir / "train").rmdir()
    (image_dir / ".DS_Store").write_bytes(b"x")
    (image_dir / "cat" / "Thumbs.db").write_bytes(b"x")
    shutil.copy(image_dir / "cat" / "0.jpg", image_dir / "cat" / "0.GIF")
    data = load(image_dir, imbalance_factor=2, long_tail="step")
    assert data.class_names == expected.class_names
    assert data.class_counts.tolist() == [6, 3, 1]
    assert data.test.labels.tolist() == [0, 1, 2]


def test_a_class_of_one_image_is_trained_on(image_dir, data_error):
    shutil.rmtree(image_dir / "val")
    (image_dir / "train" / "eel" / "1.png").unlink()
    data = load(image_dir, val_share=0.9)
    assert (data.class_counts.tolist(), sorted(data.test.labels)) == ([1, 1, 1], [0] * 5 + [1] * 3)
    for name in ("cat", "dog"):
        for path in sorted((image_dir / "train" / name).iterdir())[1:]:
            path.unlink()
    with data_error("no validation images, and none can be set aside"):
        load(image_dir)


def test_a_class_whose_name_is_not_utf_8(image_dir):
    (image_dir / "train" / "eel").rename(image_dir / "train" / os.fsdecode(b"\xe9el"))
    shutil.rmtree(image_dir / "val")
    data = load(image_dir)
    assert data.class_names == ("cat", "dog", "\\xe9el")
    assert data.train[len(data.train) - 1][1] == 2


@pytest.mark.parametrize("part", ["train", "val"])
def test_no_class_folders(image_dir, part, data_error):
    shutil.rmtree(image_dir / part)
    (image_dir / part).mkdir()
    Image.new("RGB", (9, 9)).save(image_dir / part / "loose.png")
    with data_error(f"{image_dir / part}: no class folders", f"{part}/CLASS"):
        load(image_dir)


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_empty_class(image_dir, part, data_error):
    folder = image_dir / part / "dog"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "readme.txt").write_text("no image")
    with data_error(f"{folder}: no images", ".jpg", "remove the folder"):
        load(image_dir)


def test_a_class_without_training_images(image_dir, data_error):
    shutil.copytree(image_dir / "val" / "cat", image_dir / "val" / "fox")
    with data_error(image_dir / "val" / "fox", "a class without a folder in", image_dir / "train"):
        load(image_dir)


def test_a_class_without_test_images_is_allowed(image_dir):
    shutil.rmtree(image_dir / "val" / "dog")
    data = load(image_dir)
    assert data.num_classes == 3
    assert data.test.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[: len(content) // 2], "cannot be decoded as an image"),
        (
            lambda content: b"<html>404</html>",
            "no image, or of a format that is not read here",
        ),
        (lambda content: b"\x89PNG\r\n\x1a\n" + bytes(50), "cannot be decoded as an image"),
    ],
)
def test_a_broken_image_is_named(image_dir, damage, reason, data_error):
    path = image_dir / "train" / "dog" / "0.jpg"
    path.write_bytes(damage(path.read_bytes()))
    data = load(image_dir, strict=True)
    assert path_of(data.train, image_dir, 6) == "train/dog/0.jpg"
    with data_error(path, reason, "replace or remove it"):
        data.train[6]


def test_an_image_that_vanished(image_dir, data_error):
    data = load(image_dir, strict=True)
    (image_dir / "train" / "cat" / "0.jpg").unlink()
    with data_error(image_dir / "train" / "cat" / "0.jpg", "cannot be read (No such file"):
        data.train[0]


def test_a_folder_that_cannot_be_listed(image_dir, monkeypatch, data_error):
    listed = os.scandir
    refused = image_dir / "train" / "cat"

    def refuse(folder):
        if os.fspath(folder) == str(refused):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with data_error(f"{refused}: cannot be read (Permission denied)"):
        load(image_dir)
    refused = image_dir / "val"
    with data_error(f"{refused}: cannot be read (Permission denied)"):
        load(image_dir)


def test_a_link_to_nowhere(image_dir, data_error):
    link = image_dir / "train" / "dog" / "0z.jpg"
    link.symlink_to(image_dir / "gone.jpg")
    train = load(image_dir, strict=True).train
    index = [path_of(train, image_dir, i) for i in range(len(train))].index("train/dog/0z.jpg")
    with data_error(f"{link}: cannot be read (No such file or directory)"):
        train[index]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(image_dir, mode):
    extension = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (40, 40), (200, 200, 200)).convert(mode).save(image_dir / "train" / "cat" / f"0a.{extension}")
    data = load(image_dir, augmentation="none")
    index = [path_of(data.train, image_dir, i) for i in range(7)].index(f"train/cat/0a.{extension}")
    image, _ = data.train[index]
    assert image.shape == (3, 32, 32)
    pixels = image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert pixels.mean() == pytest.approx(200 / 255, abs=0.1)


def test_path_table_keeps_names_in_flat_arrays():
    names = [f"train/n{i:08d}/{i}.JPEG" for i in range(5000)]
    table = PathTable(names)
    assert len(table) == 5000
    assert [table[i] for i in (0, 17, 4999)] == [names[0], names[17], names[4999]]
    assert [table.take(np.array([3, 1]))[i] for i in (0, 1)] == [names[3], names[1]]
    # Names and offsets, nothing per entry beside them.
    assert len(pickle.dumps(table, protocol=5)) < sum(map(len, names)) + 8 * 5001 + 1000
    assert len(PathTable([])) == 0


def test_a_pipe_is_no_image(image_dir):
    before = len(load(image_dir).train)
    os.mkfifo(image_dir / "train" / "dog" / "pipe.jpg")
    assert len(load(image_dir).train) == before
