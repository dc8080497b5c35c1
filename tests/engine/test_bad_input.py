"""What the training command refuses, and how it ends when a run cannot go on."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast import data, ops
from shike_fast.engine import trainer as trainer_module
from shike_fast.errors import DataError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "--dataset: unknown data set 'imagenet'; choose from"),
        (["--epochs", "-3"], "--epochs: must be at least 1, got -3"),
        (["--dataset", "imagefolder"], "imagefolder: needs --data-dir"),
        (["--dataset", "cifar10-lt", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--augmentation", "blur"], "unknown augmentation 'blur'"),
        (["--imbalance-factor", "0.5"], "imbalance"),
        (["--device", "tpu"], "--device: 'tpu' is no device"),
        (["--resume"], "--resume: say which run with --output-dir"),
        (["--resume", "auto"], "--resume: say which run with --output-dir"),
        (["--resume", "gone.pt"], "checkpoint gone.pt does not exist"),
        (["--resume", "--output-dir", "new"], "--resume: new holds no checkpoint"),
        (["--pretrained", "gone.pth"], "--pretrained: gone.pth is not a file"),
        (["--model", "resnet50"], "--model: resnet50 needs images of at least 32x32, digits-lt has 8x8; use resnet8"),
        (["--download"], "digits-lt: cannot be downloaded by this program"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert runs.train(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pretrained", "gone.pth"], "--pretrained: gone.pth is not a file"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph: needs a GPU, this run is on cpu"),
        (["--loader", "gpu", "--device", "cpu"], "--loader: gpu needs a GPU, this run is on cpu"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not on this machine"),
    ],
)
def test_what_has_nothing_to_do_with_the_data_is_told_before_it_is_read(runs, monkeypatch, capsys, arguments, message):
    def too_early(*_, **__):
        raise AssertionError

    monkeypatch.setattr(data, "load_dataset", too_early)
    assert runs.train(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--resume", ""], ["--output-dir", ""], ["--epochs", "ten"], ["--colour", "red"], ["extra"]]
)
def test_unusable_command_lines(runs, capsys, arguments):
    assert runs.train(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_used_directory_is_not_touched(runs, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert runs.train(*runs.small, "--output-dir", tmp_path) == 2
    assert "is not empty; add --resume" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_no_traceback_reaches_the_user(runs):
    process = runs.start("--dataset", "nothing")
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(r"error: --dataset: unknown data set 'nothing'; choose from .*\n", errors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(runs, tmp_path, monkeypatch, capsys, bad):
    steps = []
    plain = ops.dkt_loss

    def sometimes_bad(logits, labels, **options):
        loss, terms = plain(logits, labels, **options)
        steps.append(len(labels))
        return (loss * bad, terms) if len(steps) == 9 else (loss, terms)

    monkeypatch.setattr(ops, "dkt_loss", sometimes_bad)
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "the loss is not finite at step 3 of 6 in epoch 2" in errors
    assert f"; the last good state is in {tmp_path / 'run' / 'last.pt'}" in errors
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(runs.metrics(tmp_path / "run")) == 1


def test_a_non_finite_loss_in_the_first_epoch_keeps_the_initial_one(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        ops, "dkt_loss", lambda logits, labels, **options: (logits.sum() * float("nan"), torch.zeros(3))
    )
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "the loss is not finite at step 1 of 6 in epoch 1" in errors
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["batch"]) == (0, 0)


def assert_every_checkpoint_is_finite(directory, runs):
    for path in directory.glob("*.pt"):
        assert all(value.isfinite().all() for value in runs.checkpoint(path)["model"].values())


def test_one_huge_step(runs, tmp_path, capsys):
    """Its own loss is finite; only what comes after shows that the weights are lost."""
    huge = ["--batch-size", 400, "--lr", 3e38, "--warmup-epochs", 0, "--momentum", 0]
    assert runs.train("--model", "resnet8", "--epochs", 4, *huge, "--output-dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert re.match(
        r"error: the (weights|logits on the test images) are not finite at step 1 of 1 in epoch 1; ", errors
    )
    assert errors.count("\n") == 1
    assert_every_checkpoint_is_finite(tmp_path / "run", runs)
    assert not (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize(
    ("parameter", "value", "what"),
    [("conv1.weight", float("inf"), "weights"), ("bn1.weight", 3e38, "logits on the test images")],
)
def test_lost_weights_are_never_saved(runs, tmp_path, monkeypatch, capsys, parameter, value, what):
    plain = trainer_module.Trainer._step

    def overflowing(trainer, images, labels):
        plain(trainer, images, labels)
        if (trainer.epoch, trainer.batch) == (1, 5):
            with torch.no_grad():
                trainer.model.get_parameter(parameter).fill_(value)

    monkeypatch.setattr(trainer_module.Trainer, "_step", overflowing)
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 1
    last = tmp_path / "run" / "last.pt"
    assert capsys.readouterr().err == (
        f"error: the {what} are not finite at step 6 of 6 in epoch 2; try a lower --lr, or --amp bf16 or off; "
        f"the last good state is in {last}\n"
    )
    assert runs.checkpoint(last)["epoch"] == 1
    assert_every_checkpoint_is_finite(tmp_path / "run", runs)


def test_a_broken_image_ends_a_strict_run_with_its_name(runs, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for part, label, image in itertools.product(("train", "val"), ("cat", "dog"), range(3)):
        path = tmp_path / "images" / part / label / f"{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    (tmp_path / "images" / "train" / "dog" / "1.png").write_bytes(b"not an image")
    arguments = ["--dataset", "imagefolder", "--data-dir", tmp_path / "images", "--model", "resnet8", "--workers", 0]
    assert runs.train(*arguments, "--strict", "--epochs", 1, "--output-dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert re.match(r"error: .*dog/1\.png: cannot be decoded as an image", errors)
    assert errors.count("\n") == 1


def test_one_class_is_not_enough(runs, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "images" / part / "cat").mkdir(parents=True)
    assert (
        runs.train("--dataset", "imagefolder", "--data-dir", tmp_path / "images", "--output-dir", tmp_path / "x") == 2
    )
    assert "holds one class, cat; there must be two class folders or more" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_that_cannot_be_built(runs, tmp_path, capsys, monkeypatch):
    plain = data.load_dataset
    monkeypatch.setattr(
        data, "load_dataset", lambda *a, **o: dataclasses.replace(plain(*a, **o), class_names=("only",))
    )
    assert runs.train(*runs.small, "--output-dir", tmp_path / "x") == 2
    assert "--model: resnet8 cannot be built for digits-lt: num_classes must be at least 2" in capsys.readouterr().err


def test_flags_reach_the_data_set(runs, monkeypatch):
    seen = {}

    def stop_here(name, **options):
        seen.update(options, name=name)
        raise DataError("enough")

    monkeypatch.setattr(data, "load_dataset", stop_here)
    arguments = [
        "--dataset",
        "cifar10-lt",
        "--data-dir",
        "there",
        "--download",
        "--no-verify",
        "--imbalance-factor",
        50,
        "--subset",
        "ldam",
    ]
    assert runs.train(*arguments, "--augmentation", "none", "--seed", 7, "--image-size", 48, "--strict") == 2
    assert seen == {
        "name": "cifar10-lt",
        "data_dir": "there",
        "download": True,
        "verify": False,
        "imbalance_factor": 50.0,
        "augmentation": "none",
        "seed": 7,
        "image_size": 48,
        "strict": True,
        "subset": "ldam",
        "long_tail": "exp",
    }
