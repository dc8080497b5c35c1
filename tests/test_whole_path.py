"""From nothing to predictions, as a user goes: synth, check, pack, train, evaluate and predict, for all large sets."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

from shike_fast import evaluate, predict, train
from shike_fast.data.__main__ import main as data_command

CLASSES, CHANCE = 8, 100 / 8
SYNTH = ["--classes", CLASSES, "--images", 480, "--test-per-class", 10, "--short-side", 48, "--workers", 2]
SMALL = ["--model", "resnet8", "--image-size", 32, "--batch-size", 32, "--lr", 0.05, "--stage2-lr", 0.05]
EPOCHS = ["--epochs", 10, "--stage2-epochs", 2, "--pretrained", "none"]


def run(command, *arguments):
    assert command([str(argument) for argument in arguments]) == 0


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inat18", "imagenet-lt", "places-lt"])
def test_from_nothing_to_predictions(name, tmp_path, capsys):
    raw, pack, output = tmp_path / "raw", tmp_path / "pack", tmp_path / "run"
    run(data_command, "synth", "--like", name, *SYNTH, raw)
    run(data_command, "check", "--dataset", name, "--data-dir", raw)
    run(data_command, "pack", "--dataset", name, "--data-dir", raw, "--short-side", 40, "--workers", 2, pack)
    run(data_command, "check", "--dataset", name, "--data-dir", pack)
    # RandAugment at full strength is too much for so few and so small images.
    data = ["--dataset", name, "--data-dir", pack, "--augmentation", "rrc", "--workers", 0]
    run(train.main, *data, *SMALL, *EPOCHS, "--output-dir", output)
    rows = metrics(output)
    assert rows[7]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert rows[-1]["top1"] > 3 * CHANCE
    assert [row["unreadable_images"] for row in rows] == [0] * 10

    capsys.readouterr()
    # Files and pack are the same images: a network that learned from one knows the other.
    results = []
    for source in (pack, raw):
        run(evaluate.main, "--checkpoint", output / "last.pt", "--data-dir", source, "--workers", 0, "--json")
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["top1"] == rows[-1]["top1"]
    assert results[1]["top1"] == pytest.approx(results[0]["top1"], abs=10)
    assert results[0]["test_images"] == 80

    folder = next(raw.rglob("*.jpg" if name != "imagenet-lt" else "*.JPEG")).parent
    table = tmp_path / "predictions.csv"
    options = ["--workers", 0, "--output", table, "--top", 3]
    run(predict.main, "--checkpoint", output / "last.pt", "--images", folder, *options)
    with open(table, newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(os.listdir(folder))
    for row in found:  # six digits: of a network that is sure, the second may be 0.000000
        first, second, third = (float(row[f"probability_{rank}"]) for rank in (1, 2, 3))
        assert 1 >= first >= second >= third >= 0 and first > 1 / CLASSES and first + second + third < 1 + 1e-5


@pytest.mark.slow
def test_a_few_steps_of_the_real_network_as_commands(programs, tmp_path):
    """The recipe of iNaturalist as it is, but for its size: resnet50, RandAugment, two workers."""

    def command(module, *arguments):
        done = programs.run([sys.executable, "-m", f"shike_fast.{module}", *arguments], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("data", "synth", "--like", "inat18", "--classes", 6, "--images", 24, "--short-side", 64, "raw")
    command("data", "check", "--dataset", "inat18", "--data-dir", "raw", "--decode")
    settings = [
        "--image-size",
        64,
        "--batch-size",
        8,
        "--lr",
        0.005,
        "--accumulate",
        2,
        "--checkpoint-activations",
        "--workers",
        2,
    ]
    train_arguments = ["--dataset", "inat18", "--data-dir", "raw", "--epochs", 1, *settings, "--output-dir", "run"]
    printed = command("train", *train_arguments)
    assert "shike, resnet50, 3 experts" in printed and "loader: " in printed
    (row,) = metrics(tmp_path / "run")
    assert 0 < row["train_loss"] < 1000
    images = tmp_path / "raw" / "train_val2018"
    command("predict", "--checkpoint", "run/last.pt", "--images", images, "--workers", 1)
    assert len(Path(tmp_path / "predictions.csv").read_text().splitlines()) > 24
