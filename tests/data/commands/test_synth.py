import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from shike_fast.data import load_dataset
from shike_fast.data.__main__ import main
from shike_fast.data.commands.synth import tail_counts
from shike_fast.data.commands.synthetic import image_sizes, render, style_of

NAMES = ("inat18", "imagenet-lt", "places-lt")


def synth(root, like="inat18", **options):
    options = {"classes": 4, "images": 40, "test_per_class": 2, "short_side": 24, "workers": 2} | options
    pairs = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return main(["synth", "--like", like, *pairs, str(root)])


def contents(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("like", NAMES)
def test_a_generated_set_loads_like_the_real_one(tmp_path, like, capsys):
    root = tmp_path / "new" / "set"
    assert synth(root, like) == 0
    printed = capsys.readouterr().out
    assert f"use it with --dataset {like} --data-dir {root}\n" in printed
    data = load_dataset(like, data_dir=root, image_size=16, strict=True)
    assert (len(data.train), data.num_classes) == (40, 4)
    assert sorted(data.class_counts.tolist())[0] == 2
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2, 2]
    assert data.train.batch(np.arange(40), seed=0, epoch=0)[0].shape == (40, 3, 16, 16)
    assert data.test.batch(np.arange(8), seed=0, epoch=0)[0].isfinite().all()
    assert len(set(data.class_names)) == 4
    assert main(["check", "--dataset", like, "--data-dir", str(root), "--decode", "--workers", "1"]) == 0
    assert "  training images        40  (generated: 40)\n" in capsys.readouterr().out


@pytest.mark.parametrize("like", ["imagefolder", "table"])
def test_a_generated_set_in_a_form_for_ones_own_images(tmp_path, like):
    assert synth(tmp_path, like) == 0
    data = load_dataset(like, data_dir=tmp_path, image_size=16, strict=True)
    assert data.class_names == tuple(f"pattern {label:04d}" for label in range(4))
    assert (len(data.train), np.bincount(data.test.labels).tolist(), data.validation) == (40, [2, 2, 2, 2], None)
    assert data.test.batch(np.arange(8), seed=0, epoch=0)[0].isfinite().all()


def test_the_form_of_inat18(tmp_path):
    synth(tmp_path)
    train = json.loads((tmp_path / "train2018.json").read_text())
    assert {"images", "annotations", "categories", "info", "licenses"} == train.keys()
    for record in train["images"]:
        assert {"id", "width", "height", "file_name", "license", "rights_holder"} == record.keys()
        with Image.open(tmp_path / record["file_name"]) as image:
            assert image.format == "JPEG"
            assert image.size == (record["width"], record["height"])
    first, second = train["images"][0], train["annotations"][0]
    assert {"id", "image_id", "category_id"} == second.keys()
    assert [a["image_id"] for a in train["annotations"]] != [i["id"] for i in train["images"]]
    label = next(a["category_id"] for a in train["annotations"] if a["image_id"] == first["id"])
    assert first["file_name"].startswith("train_val2018/")
    assert first["file_name"].split("/")[2] == f"{label:04d}"
    assert (tmp_path / "train_val2018" / "Plantae" / "0000").is_dir()
    counts = json.loads((tmp_path / "synthetic.json").read_text())
    assert counts == {"like": "inat18", "classes": 4, "images": {"train": 40, "test": 8}, "generated": True}


def test_the_form_of_imagenet_lt(tmp_path):
    synth(tmp_path, "imagenet-lt")
    lines = {part: (tmp_path / f"ImageNet_LT_{part}.txt").read_text().splitlines() for part in ("train", "val", "test")}
    assert [len(part) for part in lines.values()] == [40, 4, 8]
    assert all(line.startswith("train/n0") and ".JPEG " in line for line in lines["train"] + lines["val"])
    assert all(line.startswith("val/n0") for line in lines["test"])
    paths = [line.rpartition(" ")[0] for part in lines.values() for line in part]
    assert len(set(paths)) == 52
    assert all((tmp_path / path).is_file() for path in paths)


def test_the_form_of_places_lt(tmp_path):
    synth(tmp_path, "places-lt")
    lines = {part: (tmp_path / f"Places_LT_{part}.txt").read_text().splitlines() for part in ("train", "val", "test")}
    assert [len(part) for part in lines.values()] == [40, 4, 8]
    assert all(line.startswith("data_256/") for line in lines["train"] + lines["val"])
    assert lines["test"][0].startswith("val_256/Places365_val_00000001.jpg ")
    assert any("/indoor/" in line for line in lines["train"])
    paths = [line.rpartition(" ")[0] for part in lines.values() for line in part]
    assert all((tmp_path / path).is_file() for path in paths)


def test_the_files_depend_on_the_options_alone(tmp_path):
    for name, options in (("a", {"workers": 1}), ("b", {"workers": 3}), ("c", {"seed": 1})):
        synth(tmp_path / name, **options)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    images = [{digest for name, digest in files.items() if name.endswith(".jpg")} for files in (first, other)]
    assert len(images[0]) == 48
    assert not images[0] & images[1]


def test_the_number_of_test_images_by_default(tmp_path):
    arguments = ["--classes", "2", "--images", "4", "--short-side", "8"]
    for like, count in zip(NAMES, (3, 10, 10), strict=True):
        assert main(["synth", "--like", like, *arguments, str(tmp_path / like)]) == 0
        assert len(load_dataset(like, data_dir=tmp_path / like).test) == 2 * count


@pytest.mark.parametrize(
    ("images", "classes", "factor"),
    [(437_513, 8142, 500), (115_846, 1000, 256), (62_500, 365, 996), (600, 8, 500), (100, 2, 500), (16_285, 8142, 500)],
)
def test_the_long_tail(images, classes, factor):
    counts = tail_counts(images, classes, factor)
    assert counts.sum() == images
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] >= 2
    assert counts[0] / counts[-1] <= 1.3 * factor


def test_the_imbalance_factor_is_reached_where_there_are_enough_images():
    counts = tail_counts(100_000, 100, 256)
    assert counts[0] / counts[-1] == pytest.approx(256, rel=0.1)


def test_the_shortest_tails():
    assert tail_counts(16, 8, 500).tolist() == [2] * 8
    assert tail_counts(8, 8, 500).tolist() == [1] * 8
    assert tail_counts(15, 8, 500).tolist()[-1] == 1
    assert tail_counts(15, 8, 500).sum() == 15


def test_sizes_of_the_images():
    sizes = image_sizes(500, 60, np.random.default_rng(0))
    assert sizes.min() == 60
    assert sizes.max() <= 80
    assert len(np.unique(sizes)) > 15
    upright = (sizes[:, 1] > sizes[:, 0]).mean()
    assert 0.4 < upright < 0.6


def test_classes_can_be_told_apart_by_colour_alone_and_mirrored():
    """The nearest centre of the mean colours of 8 classes, of mirrored windows as random resized crops cut them."""
    random = np.random.default_rng(0)

    def features(label):
        pixels = render(style_of(label), 40, 32, random)[:, ::-1]
        top, left = random.integers(0, 12, 2)
        window = pixels[top : top + 20, left : left + 20].reshape(-1, 3) / 255
        return np.concatenate([window.mean(0), window.std(0)])

    centres = np.array([np.mean([features(label) for _ in range(10)], axis=0) for label in range(8)])
    right = [
        np.linalg.norm(centres - features(label), axis=1).argmin() == label for label in range(8) for _ in range(10)
    ]
    assert np.mean(right) > 0.6  # chance: 0.125


def test_styles_of_many_classes_differ():
    styles = [style_of(label) for label in range(8142)]
    assert len(set(styles)) == 8142
    assert all(0 <= style.angle <= np.pi / 2 for style in styles)
    assert {0 <= style.hue < 1 for style in styles} == {True}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": 5, "images": 4}, "error: --images 4 are too few for 5 classes"),
        ({"classes": 1}, "error: --classes must be 2 … 9999, got 1"),
        ({"classes": 10_000, "images": 20_000}, "error: --classes must be 2 … 9999, got 10000"),
        ({"short_side": 4}, "error: --short-side must be 8 … 4096, got 4"),
        ({"seed": -1}, "error: --seed must be an integer from 0"),
    ],
)
def test_bad_input(tmp_path, options, text, capsys):
    assert synth(tmp_path / "new", **options) == 2
    assert capsys.readouterr().err.startswith(text)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert synth(tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is not empty; choose another folder")
    assert synth(tmp_path / "mine.txt") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'mine.txt'}: is not a folder")
    assert synth(tmp_path / "mine.txt" / "new") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'mine.txt' / 'new'}: cannot be written (Not a directory); choose another folder\n"
    )
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_images_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def fail(self, content):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    assert synth(tmp_path / "new") == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: cannot write {tmp_path / 'new' / 'train_val2018'}")
    assert printed.endswith(": No space left on device\n")
    assert not (tmp_path / "new" / "synthetic.json").exists()


def test_an_unknown_form(tmp_path, capsys):
    assert synth(tmp_path, "cifar10-lt") == 2
    assert "inat18" in capsys.readouterr().err
