"""Whole runs with networks of timm: trained, resumed bit for bit, evaluated, used to predict; and what refuses them."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
import torchvision_operators  # noqa: F401  (timm imports torchvision)
from PIL import Image

import shike_fast
from shike_fast import info, models
from shike_fast.data.__main__ import main as data
from shike_fast.evaluate import main as evaluate
from shike_fast.export import main as export
from shike_fast.models import registry
from shike_fast.models.timm_networks import timm_network
from shike_fast.predict import main as predict
from shike_fast.train import make_parser

timm = pytest.importorskip("timm")

DIGITS = ["--image-size", 32, "--batch-size", 64, "--epochs", 2, "--stage2-epochs", 1, "--lr", 0.01, "--threads", 1]
WHOLE = {"vit": "timm:test_vit", "convnext": "timm:test_convnext"}


def weights(path, name):
    torch.manual_seed(4)
    torch.save(timm.create_model(name).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_on_resized_digits(runs, tmp_path, name):
    run = tmp_path / "run"
    pretrained = weights(tmp_path / "weights.pth", WHOLE[name].removeprefix("timm:"))
    options = ["--model", WHOLE[name], *DIGITS, "--pretrained", pretrained, "--output-dir", run]
    assert runs.train(*options) == 0
    (run / "last.pt").rename(tmp_path / "whole.pt")  # the checkpoint before it is there
    assert runs.train("--resume", "--output-dir", run) == 0
    runs.assert_same_weights(tmp_path / "whole.pt", run / "last.pt")
    state = runs.checkpoint(run / "last.pt")
    assert state["model_description"]["name"] == WHOLE[name] and state["model_description"]["in_channels"] == 1
    pretrained.unlink()  # what follows needs the checkpoint alone
    assert evaluate(["--checkpoint", str(run / "last.pt"), "--json"]) == 0
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "black.png")
    output = tmp_path / "predictions.csv"
    arguments = ["--checkpoint", run / "last.pt", "--images", tmp_path / "images", "--workers", 0, "--output", output]
    assert predict([str(argument) for argument in arguments]) == 0
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_on_generated_photographs(runs, tmp_path, capsys, name):
    folder, run = tmp_path / "photos", tmp_path / "run"
    sizes = ["--classes", "4", "--images", "60", "--test-per-class", "3", "--short-side", "72", "--workers", "2"]
    assert data(["synth", "--like", "places-lt", *sizes, str(folder)]) == 0
    options = ["--dataset", "places-lt", "--data-dir", folder, "--pretrained", "none", "--image-size", 64]
    options += ["--model", WHOLE[name], "--batch-size", 16, "--epochs", 2, "--stage2-epochs", 1, "--lr", 0.01]
    more = [
        "--amp",
        "bf16",
        "--checkpoint-activations",
        "--accumulate",
        2,
        "--ema",
        0.9,
        "--workers",
        0,
        "--threads",
        1,
    ]
    assert runs.train(*options, *more, "--output-dir", run) == 0
    (run / "last.pt").rename(tmp_path / "whole.pt")
    assert runs.train("--resume", "--output-dir", run) == 0
    runs.assert_same_weights(tmp_path / "whole.pt", run / "last.pt")
    capsys.readouterr()
    assert evaluate(["--checkpoint", str(run / "last.pt"), "--json", "--workers", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == runs.metrics(run)[-1]["top1"]
    photographs = sorted(folder.rglob("*.jpg"))[:3]
    assert_exported_alike(run / "last.pt", tmp_path, photographs)


def assert_exported_alike(checkpoint, folder, images):
    """Every format says what the network says, of one image and of several."""
    formats = {"torch": "model.pt2", "safetensors": "hub"}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        formats["onnx"] = "model.onnx"
    expected = shike_fast.load(checkpoint, amp="off").predict(images).probabilities
    for kind, name in formats.items():
        arguments = ["--checkpoint", checkpoint, "--format", kind, folder / name]
        assert export([str(argument) for argument in arguments]) == 0
        loaded = shike_fast.load(folder / name, **({"amp": "off"} if kind == "safetensors" else {}))
        for batch in (1, len(images)):
            found = loaded.predict(images[:batch]).probabilities
            torch.testing.assert_close(found, expected[:batch], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "options", [[], ["--adapter", "lora"], ["--adapter", "adaptformer"]], ids=lambda o: "-".join(o)
)
def test_exported_from_digits(runs, tmp_path, name, options):
    if "lora" in options:
        pytest.importorskip("peft")
    run = ["--model", WHOLE[name], *DIGITS, *options, "--output-dir", tmp_path / "run"]
    assert runs.train(*run) == 0
    images = [np.random.default_rng(i).integers(0, 256, (8 + i, 9), dtype=np.uint8) for i in range(3)]
    assert_exported_alike(tmp_path / "run" / "last.pt", tmp_path, images)


@pytest.mark.slow
def test_what_is_dropped_at_random_is_the_same_after_a_resume(runs, tmp_path, monkeypatch):
    """Within an epoch too: the checkpoint holds the state of the generators."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @models.register_model
    def dropping(**options):
        return timm_network("test_vit", network_options={"drop_path_rate": 0.3, "drop_rate": 0.2}, **options)

    run = tmp_path / "run"
    options = ["--model", "dropping", *DIGITS, "--save-every", 4, "--output-dir", run]
    assert runs.train(*options) == 0
    (run / "last.pt").rename(tmp_path / "whole.pt")
    assert runs.checkpoint(next(run.glob("last*")))["batch"] > 0
    assert runs.train("--resume", "--output-dir", run) == 0
    runs.assert_same_weights(tmp_path / "whole.pt", run / "last.pt")


@pytest.mark.slow
def test_compiled(runs, tmp_path):
    options = ["--model", "timm:test_vit", "--image-size", 32, "--experts", 2, "--batch-size", 383]  # one graph
    options += ["--epochs", 1, "--stage2-epochs", 0, "--lr", 0.01, "--compile"]
    assert runs.train(*options, "--output-dir", tmp_path / "run") == 0


@pytest.mark.slow
def test_several_seeds(runs, tmp_path):
    options = ["--model", "timm:test_vit", *DIGITS, "--seeds", 2]
    assert runs.train(*options, "--output-dir", tmp_path / "seeds") == 0
    assert len(list((tmp_path / "seeds").glob("*/last.pt"))) == 2


@pytest.mark.slow
def test_two_processes_train_one_network(runs, programs, tmp_path, pytestconfig):
    support = str(pytestconfig.rootpath / "tests" / "support")
    environment = os.environ | {"PYTHONPATH": support, "OMP_NUM_THREADS": "1"}
    options = ["--model", "timm:test_efficientnet", *DIGITS, "--sync-batch-norm", "--plugin", "torchvision_operators"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--local-addr", "localhost", "-m", "shike_fast.train"]
    done = programs.run([*launcher, *options, "--output-dir", tmp_path / "run"], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert runs.checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "timm:test_vitt"],
            "timm:test_vitt cannot be built for digits-lt: timm has no network 'test_vitt'; ",
        ),
        (
            ["--model", "timm:test_vit", "--expert-stages", 9],
            "with --expert-stages 9: expert_stages must be from 1 to 5 b",
        ),
        (["--model", "timm:test_convnext"], "needs images of at least 32x32, digits-lt has 8x8; use resnet8, resnet20"),
        (["--model", "timm:test_vit", "--shortcut", "pad"], "TimmTransformer has no option shortcut"),
        (["--model", "timm:test_resnet", "--method", "ride"], "TimmStages has no option expert_width"),
        (["--model", "tim:test_vit"], "--model: must be one of resnet8, "),
        (["--model", "resnet8", "--pretrained", "timm"], "timm publishes weights of networks of timm alone"),
        (["--model", "timm:test_vit", "--image-size", 32, "--pretrained", "x.pth"], "x.pth is not a file"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(runs, tmp_path, capsys, options, message):
    assert runs.train(*options, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_fetched_are_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    options = ["--model", "timm:test_vit.r160_in1k", "--image-size", 32, "--pretrained", "timm"]
    assert runs.train(*options, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "error: --pretrained: the weights that timm publishes for test_vit.r160_in1k cannot be had (" in error
    assert error.count("\n") == 1


def test_another_normalisation_is_said(runs, tmp_path, capsys):
    file = weights(tmp_path / "weights.pth", "test_vit")
    options = ["--model", "timm:test_vit", "--image-size", 16, "--epochs", 1, "--stage2-epochs", 0, "--lr", 0.01]
    assert runs.train(*options, "--pretrained", file, "--output-dir", tmp_path / "run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "normalisation: the weights of timm:test_vit were made for images of mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
        in printed
    )
    assert "digits-lt has mean 0.305, std 0.376" in printed
    assert runs.train(*options, "--output-dir", tmp_path / "random") == 0
    assert "normalisation: " not in capsys.readouterr().out


def test_the_family_is_named_by_help_and_info():
    assert "timm:NAME" in make_parser().format_help()
    assert info.collect()["registered"]["models"][-1] == "timm:NAME"
