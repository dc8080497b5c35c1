"""The description of a data set: on the terminal, as JSON, as a page, as a picture, and in Python."""

import dataclasses
import json
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from described import made
from pages import Page
from PIL import Image

from shike_fast import data
from shike_fast.data.__main__ import main
from shike_fast.data.commands import description_files
from shike_fast.data.description.describe import FINDINGS
from shike_fast.data.description.sizes import ShotBands


def run(image_dir, *options, dataset="imagefolder"):
    return main(["describe", "--dataset", dataset, "--data-dir", str(image_dir), *map(str, options)])


def copy(image_dir, source, target):
    (image_dir / target).write_bytes((image_dir / source).read_bytes())


@pytest.fixture
def odd_dir(image_dir):
    """The image folder with something of every kind that there is to find."""
    copy(image_dir, "train/cat/0.jpg", "val/dog/seen.jpg")
    copy(image_dir, "train/eel/0.jpg", "train/eel/again.jpg")
    single = image_dir / "train" / "Cat "
    single.mkdir()
    Image.new("RGB", (30, 30)).save(single / os.fsdecode(b"caf\xe9.jpg"))
    copy(image_dir, "train/cat/1.png", "train/loose.PNG")
    Image.new("RGB", (9, 9), "red").save(image_dir / os.fsdecode(b"caf\xe9.jpg"))
    (image_dir / "train" / "cat" / "empty.jpg").write_bytes(b"")
    (image_dir / "notes.txt").write_text("none")
    (image_dir / ".DS_Store").write_bytes(b"none")
    return image_dir


def test_digits_lt(capsys):
    assert main(["describe", "--dataset", "digits-lt"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:8] == [
        "digits-lt",
        "  classes                10",
        "  training images        383; of a class: 114 at most, 25.5 in the median, 5 at least",
        "  test images            600; of a class: 60",
        "  imbalance factor       22.8, the largest class over the smallest",
        "  Gini coefficient       0.475; 0: all classes of one size, near 1: one class has nearly all images",
        "  effective classes      6.9 of 10, by entropy",
        "  largest 10 %           29.8 % of the training images are in the largest class",
    ]
    assert (
        "  many / medium / few    1 / 5 / 4 classes: more than 100 training images, between, fewer than 20" in printed
    )
    assert "  0                            114        60  many" in printed
    assert "  9                              5        60  few" in printed
    assert "  leakage                0  (test images that are training images as well)" in printed
    unknown = "  unlabelled             –  (image files that the data set does not name: cannot be found out)"
    assert unknown in printed
    assert printed[-2] == "what to do" and printed[-1].startswith("  Long-tailed: begin with --method la")


def test_a_balanced_set_needs_no_method(capsys):
    assert main(["describe", "--dataset", "digits-lt", "--imbalance-factor", "1", "--no-duplicates"]) == 0
    printed = capsys.readouterr().out
    assert "imbalance factor       1, " in printed and "Gini coefficient       0.000" in printed
    assert "effective classes      10 of 10" in printed and "suggested" not in printed
    assert (
        "  leakage                –  (test images that are training images as well: images are not compared)" in printed
    )
    assert printed.endswith("about one size: --method ce is enough, long-tail methods have nothing to correct.\n")


def test_a_clean_folder(image_dir, capsys):
    assert run(image_dir) == 0
    printed = capsys.readouterr().out
    assert "  training images        12; of a class: 6 at most, 4 in the median, 2 at least\n" in printed
    assert "  many / medium / few    0 / 0 / 3 classes: " in printed
    assert "  suggested instead      1 / 1 / 1 classes: more than 4 training images, between, fewer than 4, " in printed
    assert "  cat                            6         2  many\n" in printed
    for name in FINDINGS:
        assert re.search(rf"^  {name} +0  \(", printed, re.MULTILINE)
    assert "not compared" not in printed
    assert "The smallest test class has 2 images: one image is 50 points" in printed
    assert "  Mildly imbalanced: compare --method ce with la or balanced-softmax" in printed


def test_everything_odd_is_named(odd_dir, capsys):
    assert run(odd_dir) == 0
    printed = capsys.readouterr().out
    for line in (
        "  leakage                1  (test images that are training images as well)",
        "    train/cat/0.jpg (cat) = val/dog/seen.jpg (dog)",
        "  contradictions         1  (images that are there with different labels)",
        "  duplicates             1  (superfluous copies within training or within the test)",
        "    train/eel/0.jpg (eel) = train/eel/again.jpg (eel)",
        "  one-sided              1  (classes without training or without test images)",
        "    Cat : no test image",
        "  single                 1  (classes with one training image)",
        "  names                  1  (class names that differ by case or spaces alone)",
        "    'Cat ', 'cat'",
        "  unlabelled             2  (image files that the data set does not name)",
        r"    caf\xe9.jpg",
        "    train/loose.PNG",
        "  not compared           1  (images that are missing, empty or unreadable; python -m shike_fast.data check "
        "names them)",
        "  other files            1  (no images by their endings: .txt 1)",
        "    notes.txt",
        "  Test images that are training images as well flatter the accuracy: remove them from one side.",
        "  Of copies with different labels at least one label is wrong: look at them before anything else.",
    ):
        assert f"{line}\n" in printed


def test_json_says_the_same(odd_dir, tmp_path, capsys):
    path = tmp_path / "d.json"
    assert run(odd_dir, "--json", path) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["description_of"] == "imagefolder"
    assert (content["classes"], content["training_images"], content["test_images"]) == (4, 15, 7)
    assert (content["largest"], content["median"], content["smallest"]) == (7, 3.5, 1)
    assert content["imbalance_factor"] == 7
    assert content["gini"] == pytest.approx(2 * (1 * 1 + 2 * 3 + 3 * 4 + 4 * 7) / (4 * 15) - 5 / 4)
    shares = np.array([1, 3, 4, 7]) / 15
    assert content["effective_classes"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert (content["head_classes"], content["head_share"]) == (1, pytest.approx(7 / 15))
    assert content["shots"] == {
        "many_above": 100,
        "few_below": 20,
        "classes": {"many": 0, "medium": 0, "few": 4},
    }
    assert content["suggested_shots"] == {
        "many_above": 4,
        "few_below": 3,
        "classes": {"many": 1, "medium": 2, "few": 1},
    }
    assert content["findings"] == {
        "leakage": 1,
        "contradictions": 1,
        "duplicates": 1,
        "one-sided": 1,
        "single": 1,
        "names": 1,
        "unlabelled": 2,
    }
    assert (content["training_only"], content["test_only"], content["absent"]) == ([0], [], [])
    assert (content["single"], content["similar_names"], content["not_compared"]) == ([0], [[0, 1]], 1)
    leak, twice = content["duplicates"]
    assert leak == [
        {"part": "training", "index": 1, "label": 1, "name": f"{odd_dir}/train/cat/0.jpg"},
        {"part": "test", "index": 4, "label": 2, "name": f"{odd_dir}/val/dog/seen.jpg"},
    ]
    assert [one["name"] for one in twice] == [f"{odd_dir}/train/eel/{name}.jpg" for name in ("0", "again")]
    assert content["unnamed_files"] == {
        "folder": str(odd_dir),
        "images": 2,
        "image_names": [r"caf\xe9.jpg", "train/loose.PNG"],
        "image_folders": {".": 1, "train": 1},
        "others": 1,
        "other_names": ["notes.txt"],
        "other_endings": {".txt": 1},
        "closed": [],
    }
    assert content["class_sizes"][1] == {"class": 1, "name": "cat", "training": 7, "test": 2}
    described = data.describe(data.load_dataset("imagefolder", data_dir=odd_dir))
    assert content["advice"] == list(described.advice)
    assert description_files.as_json(described) == path.read_bytes()
    assert run(odd_dir, "--json", path) == 0  # its own file may be replaced


def test_json_where_nothing_is_compared(tmp_path):
    path = tmp_path / "d.json"
    assert main(["describe", "--dataset", "digits-lt", "--no-duplicates", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["duplicates"] is content["not_compared"] is content["unnamed_files"] is None
    assert content["findings"]["leakage"] is content["findings"]["unlabelled"] is None
    assert content["findings"]["one-sided"] == 0


def test_the_page(odd_dir, tmp_path):
    path = tmp_path / "d.html"
    assert run(odd_dir, "--html", path) == 0
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == 1 and page.tags.count("h1") == 1
    assert [link[:22] for link in page.links] == ["data:image/png;base64,"]
    assert "http" not in text and "<script" not in text
    for words in ("imagefolder", "cat", "0.317", "train/cat/0.jpg (cat) = val/dog/seen.jpg (dog)", r"caf\xe9.jpg"):
        assert words in page.words
    assert run(odd_dir, "--html", path) == 0


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_picture(image_dir, tmp_path, form):
    path = tmp_path / f"d.{form}"
    assert run(image_dir, "--picture", path) == 0
    content = path.read_bytes()
    if form == "png":
        with Image.open(path) as image:
            image.load()
            assert image.size == (960, 552)
    else:
        words = "".join(ElementTree.fromstring(content).itertext())
        for text in ("imagefolder: imbalance factor 3, Gini 0.222", "cat", "eel", "few: 1 class", "test images"):
            assert text in words
    assert run(image_dir, "--picture", path) == 0
    assert path.read_bytes() == content


def test_classes_on_one_side_are_named(monkeypatch, capsys):
    mine = made([0, 0, 2], [0, 1], ["a", "b", "c", "d"])
    monkeypatch.setattr("shike_fast.data.commands.describe.load_dataset", lambda name, **options: mine)
    assert main(["describe", "--dataset", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "  one-sided              3  (" in printed
    assert "    c: no test image\n    b: no training image\n    d: no image\n" in printed
    assert "  b                              0         1  –\n" in printed
    assert "leakage                –  (test images that are training images as well: cannot be found out)" in printed
    assert "1 class has fewer" not in printed and "2 classes have fewer than 5 training images" in printed


def test_many_classes_are_cut_short_unless_all_are_asked_for(monkeypatch, capsys):
    labels = np.repeat(np.arange(100), np.arange(100) + 1).tolist()
    mine = made(labels, [0], [f"class {label:03d}" for label in range(100)])
    monkeypatch.setattr("shike_fast.data.commands.describe.load_dataset", lambda name, **options: mine)
    assert main(["describe", "--dataset", "mine"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n  class 0") == 16 and "  … 84 more; --all shows them\n" in printed
    assert "  one-sided              99  (" in printed and "    … 94 more; --all shows more\n" in printed
    assert main(["describe", "--dataset", "mine", "--all"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n  class 0") == 100 and printed.count(": no test image\n") == 99 and "…" not in printed


def test_an_image_that_is_there_many_times(image_dir, capsys):
    for i in range(6):
        copy(image_dir, "train/cat/0.jpg", f"train/cat/again {i}.jpg")
    assert run(image_dir) == 0
    line = "    train/cat/0.jpg (cat) = train/cat/again 0.jpg (cat) = train/cat/again 1.jpg (cat) and 4 more\n"
    assert line in capsys.readouterr().out


def test_files_that_are_not_kept_by_name_are_counted(image_dir, capsys):
    for i in range(30):
        (image_dir / f"{i:02d}.txt").write_text("x")
    assert run(image_dir, "--all") == 0
    assert "    19.txt\n    … 10 more\n" in capsys.readouterr().out
    assert run(image_dir) == 0
    assert "    04.txt\n    … 25 more; --all shows more\n" in capsys.readouterr().out


def test_folders_that_cannot_be_listed_are_named(image_dir, capsys, monkeypatch):
    (image_dir / "closed").mkdir()
    plain = os.scandir

    def scandir(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run(image_dir) == 0
    assert "  cannot be listed       closed\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "status", "last"),
    [
        (["leakage"], 1, "failed on: leakage (1)"),
        (["unlabelled", "leakage", "leakage"], 1, "failed on: unlabelled (2), leakage (1)"),
    ],
)
def test_findings_can_fail_the_command(odd_dir, capsys, wanted, status, last):
    assert run(odd_dir, "--fail-on", *wanted) == status
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_clean_folder_fails_on_nothing(image_dir, capsys):
    assert run(image_dir, "--fail-on", *FINDINGS) == 0
    assert "failed" not in capsys.readouterr().out


def test_a_pack(image_dir, tmp_path, capsys):
    copy(image_dir, "train/cat/0.jpg", "val/cat/same.jpg")
    out = tmp_path / "pack"
    options = ["--dataset", "imagefolder", "--short-side", "32", "--workers", "1"]
    assert main(["pack", *options, "--data-dir", str(image_dir), str(out)]) == 0
    assert run(out) == 0
    printed = capsys.readouterr().out
    assert "  leakage                1  (" in printed and "train-00000.tar: train/cat/0.jpg (cat) = " in printed
    assert "  unlabelled             –  (image files that the data set does not name: cannot be found out)" in printed


def test_a_long_tail_subset(image_dir, capsys):
    assert run(image_dir, "--imbalance-factor", "3", "--subset", "ldam") == 0
    printed = capsys.readouterr().out
    assert "  imbalance factor       3, " in printed and "  unlabelled             0  (" in printed


def test_in_python(odd_dir):
    dataset = data.load_dataset("imagefolder", data_dir=odd_dir)
    description = data.describe(dataset)
    assert isinstance(description, data.Description)
    assert description.train_counts == tuple(dataset.class_counts.tolist())
    assert description.suggested_bands == ShotBands(4, 3)
    assert description.duplicates.leaked == 1 and description.unnamed.images == 2
    quick = data.describe(dataset, data_dir=str(odd_dir), duplicates=False, files=False)
    assert quick == dataclasses.replace(description, duplicates=None, unnamed=None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--dataset", "imagenet"], "error: unknown data set 'imagenet'"),
        (["--dataset", "imagefolder"], "error: imagefolder: needs --data-dir"),
        (["--dataset", "imagefolder", "--data-dir", "no/such"], "error: imagefolder: --data-dir no/such is not a"),
        (
            ["--dataset", "digits-lt", "--imbalance-factor", "0.5"],
            "error: imbalance_factor must be finite and at least",
        ),
        (["--dataset", "digits-lt", "--imbalance-factor", "x"], "error: argument --imbalance-factor: invalid float"),
        (["--dataset", "digits-lt", "--subset", "x"], "error: argument --subset: invalid choice"),
        (["--dataset", "digits-lt", "--fail-on", "x"], "error: argument --fail-on: invalid choice"),
        (["--dataset", "digits-lt", "--fail-on", "unlabelled"], "error: --fail-on unlabelled: cannot be found out of"),
        (
            ["--dataset", "digits-lt", "--no-duplicates", "--fail-on", "single", "leakage"],
            "error: --fail-on leakage: needs the comparison of images; leave out --no-duplicates",
        ),
        (["--dataset", "digits-lt", "--picture", "x.jpg"], "error: --picture: x.jpg must end in .png or .svg"),
        (["--dataset", "digits-lt", "--json", "."], "error: --json: . is a folder; name a file"),
        (["--dataset", "digits-lt", "--html", "no/x.html"], "error: --html: no is not a folder; create it"),
    ],
)
def test_bad_input(options, text, capsys):
    assert main(["describe", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(text) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "name", "refusal"),
    [
        ("--json", "x.json", "is no description of a data set"),
        ("--html", "x.html", "is no description of a data set"),
        ("--picture", "x.png", "is no picture of this command"),
    ],
)
def test_no_file_of_another_kind_is_replaced(tmp_path, capsys, option, name, refusal):
    path = tmp_path / name
    path.write_text("mine")
    assert main(["describe", "--dataset", "digits-lt", option, str(path)]) == 2
    assert capsys.readouterr().err == f"error: {option}: {path} exists and {refusal}; name another file\n"
    assert path.read_text() == "mine"
