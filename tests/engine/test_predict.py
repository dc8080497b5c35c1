"""``python -m shike_fast.predict``: a folder of images to a table of classes."""

import csv
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast import data
from shike_fast.data.images.decode import RawPicture
from shike_fast.data.images.transforms import evaluation_pixels
from shike_fast.engine.checkpoint import load_checkpoint
from shike_fast.engine.state import model_from_checkpoint
from shike_fast.predict import main


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first test images of the data set that ``finished`` was trained on, as files."""
    folder = tmp_path_factory.mktemp("digits")
    test = data.load_dataset("digits-lt").test
    (folder / "some").mkdir()
    for i in range(40):
        Image.fromarray(test.images[i, 0]).save(folder / "some" / f"{i:03}.png")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(checkpoint, images, *options):
    arguments = ["--checkpoint", checkpoint, "--images", images, "--workers", "0", *options]
    return main([str(argument) for argument in arguments])


def rows(path="predictions.csv"):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def test_the_classes_are_those_of_the_network(finished, digits, here, capsys):
    assert predict(finished / "last.pt", digits) == 0
    assert capsys.readouterr().out == "predictions.csv: 40 images, 5 classes each\n"
    state = load_checkpoint(finished / "last.pt")
    model = model_from_checkpoint(state, finished / "last.pt").eval()
    images, _ = data.load_dataset("digits-lt").test.batch(np.arange(40), seed=0, epoch=0)
    with torch.inference_mode():
        probabilities = model(images, stage=2).mean(0).softmax(1)
    found = rows()
    assert [row["image"] for row in found] == [f"some/{i:03}.png" for i in range(40)]
    for row, expected in zip(found, probabilities, strict=True):
        values, classes = expected.topk(5)
        assert [int(row[f"class_{k}"]) for k in range(1, 6)] == classes.tolist()
        assert [row[f"name_{k}"] for k in range(1, 6)] == [state["data"]["class_names"][c] for c in classes]
        assert [float(row[f"probability_{k}"]) for k in range(1, 6)] == pytest.approx(values.tolist(), abs=2e-6)
        assert row["error"] == ""


def test_top_stage_and_batch_size(finished, digits, here):
    assert predict(finished / "last.pt", digits, "--top", "1", "--output", "one.csv") == 0
    assert list(rows("one.csv")[0]) == ["image", "class_1", "name_1", "probability_1", "error"]
    assert predict(finished / "last.pt", digits, "--top", "99", "--batch-size", "7", "--output", "all.csv") == 0
    assert sum(float(rows("all.csv")[3][f"probability_{k}"]) for k in range(1, 11)) == pytest.approx(1, abs=1e-5)
    assert [row["class_1"] for row in rows("all.csv")] == [row["class_1"] for row in rows("one.csv")]
    assert predict(finished / "last.pt", digits, "--stage", "1", "--output", "other.csv") == 0
    assert [row["probability_1"] for row in rows("other.csv")] != [row["probability_1"] for row in rows("all.csv")]


def test_broken_images_have_a_reason_and_no_class(finished, digits, here, capsys):
    images = here / "images"
    images.mkdir()
    for name in ("000.png", "001.png"):
        (images / name).write_bytes((digits / "some" / name).read_bytes())
    (images / "0z.jpg").write_bytes(b"")
    weird = os.fsdecode(b"caf\xe9.png")
    (images / weird).write_bytes((digits / "some" / "002.png").read_bytes())
    assert predict(finished / "last.pt", images) == 1
    assert "1 images could not be read, the first: " in capsys.readouterr().err
    found = rows()
    assert [row["image"] for row in found] == ["000.png", "001.png", "0z.jpg", weird]
    assert found[2]["class_1"] == found[2]["probability_5"] == "" and found[2]["error"].endswith("0z.jpg: is empty")
    assert found[3]["class_1"] != ""


def test_a_network_of_photographs_brings_its_own_transform(image_dir, here, runs):
    arguments = ["--dataset", "imagefolder", "--data-dir", image_dir, "--model", "resnet8", "--image-size", 32]
    arguments += ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--output-dir", here / "run"]
    assert runs.train(*arguments) == 0
    image_dir.rename(here / "moved")  # the data set is not needed
    assert predict(here / "run" / "last.pt", here / "moved" / "val") == 0
    state = load_checkpoint(here / "run" / "last.pt")
    model = model_from_checkpoint(state, here / "run" / "last.pt").eval()
    found = rows()
    assert len(found) == 6 and {row["name_1"] for row in found} <= {"cat", "dog", "eel"}
    path = here / "moved" / "val" / found[3]["image"]
    pixels = torch.empty(3, 32, 32, dtype=torch.uint8)
    evaluation_pixels(RawPicture(np.asarray(Image.open(path).convert("RGB"))), pixels)
    mean, std = (torch.tensor(state["data"][name])[:, None, None] for name in ("mean", "std"))
    with torch.inference_mode():
        best = model(((pixels / 255 - mean) / std)[None], stage=1).mean(0).softmax(1).amax()
    assert float(found[3]["probability_1"]) == pytest.approx(float(best), abs=1e-4)


def test_as_a_command_with_workers_from_another_directory(programs, finished, digits, tmp_path):
    command = [sys.executable, "-m", "shike_fast.predict", "--checkpoint", finished / "best.pt", "--images", digits]
    done = programs.run([*command, "--workers", "2"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows(tmp_path / "predictions.csv")) == 40
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".coverage")]  # of a measured process
    assert left == ["predictions.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top", "0"), "--top: must be at least 1, got 0"),
        (("--batch-size", "0"), "--batch-size: must be at least 1, got 0"),
        (("--workers", "-1"), "--workers: must be at least 0 and here at most "),
        (("--output", "nowhere/x.csv"), "--output: nowhere is not a folder"),
        (("--output", "."), "is a folder"),
        (("--output", "/dev/null"), "--output: /dev/null is no regular file"),
        (("--output", "taken.csv"), "--output: taken.csv exists and holds no predictions"),
        (("--images", "missing"), "--images: missing is not a folder"),
        (("--images", "empty"), "--images: empty holds no images (.jpg"),
        (("--device", "cuda:99"), "--device"),
        (("--amp", "fp8"), "--amp: must be one of auto, off, bf16, fp16"),
        (("--checkpoint", "gone.pt"), "checkpoint gone.pt does not exist"),
    ],
)
def test_bad_input_is_one_line(finished, digits, here, capsys, options, message):
    (here / "taken.csv").write_text("name,price\n")
    (here / "empty").mkdir()
    assert predict(finished / "last.pt", digits, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (here / "predictions.csv").exists()


def test_a_checkpoint_without_a_transform(finished, digits, here, capsys):
    state = torch.load(finished / "last.pt", weights_only=True)
    del state["data"]["mean"]
    torch.save(state, here / "old.pt")
    assert predict("old.pt", digits) == 2
    assert "does not say how images are transformed (no 'mean')" in capsys.readouterr().err


def test_a_plain_network_has_no_second_stage(digits, here, runs, capsys):
    assert runs.train("--method", "ce", "--epochs", 1, "--model", "resnet8", "--output-dir", here / "ce") == 0
    assert predict(here / "ce" / "last.pt", digits, "--stage", "2") == 2
    assert "has no stage 2" in capsys.readouterr().err
    assert predict(here / "ce" / "last.pt", digits) == 0


def test_nothing_is_left_of_an_interrupted_table(finished, digits, here, monkeypatch):
    from shike_fast import predict as module

    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", stop)
    assert predict(finished / "last.pt", digits) == 130
    assert not list(here.glob("*.csv")) and not list(here.glob(".*.part"))
