"""The settings of the network: --fusion, --classifier, --expert-stages, --expert-width, --shortcut."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast import methods
from shike_fast.engine.config import resolve, resume_config
from shike_fast.engine.config_file import settings_from
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.methods import registry
from shike_fast.predict import main as predict

NAMES = ("fusion", "classifier", "expert_stages", "expert_width", "shortcut")
RIDE = ["--expert-stages", "2", "--expert-width", "0.75", "--shortcut", "pad", "--no-fusion", "--classifier", "linear"]
RIDE_NETWORK = {
    "fusion": False,
    "classifier": "linear",
    "expert_stages": 2,
    "expert_width": 0.75,
    "shortcut": "pad",
}


def network_of(config):
    options = config.model_arguments()
    return {name: options[name] for name in NAMES if name in options}


@pytest.fixture
def own(monkeypatch):
    """A method with its network, which its recipe for one data set changes."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @methods.register_method
    class Diverse(methods.Method):
        name = "diverse"
        summary = "experts of two stages"
        stages = (methods.Stage("training"),)
        recipes: ClassVar = {"cifar10-lt": {"expert_width": 1.0, "expert_stages": "1"}}

        @classmethod
        def model_options(cls, settings):
            return {"fusion": False, "expert_stages": 2, "expert_width": 0.75, "shortcut": "pad"}

        def loss(self, logits, target, **inputs):
            return logits.sum(), {}


def test_without_settings_it_is_the_methods_own_network():
    assert [getattr(resolve({}), name) for name in NAMES] == [None] * 5
    assert network_of(resolve({})) == {}
    assert network_of(resolve({"method": "ce"})) == {"fusion": False, "classifier": "linear"}


@pytest.mark.usefixtures("own")
def test_the_users_value_comes_before_the_recipes_and_that_before_the_methods():
    theirs = {"fusion": False, "expert_stages": 2, "expert_width": 0.75, "shortcut": "pad"}
    assert network_of(resolve({"method": "diverse"})) == theirs
    recipe = resolve({"method": "diverse", "dataset": "cifar10-lt"})
    assert network_of(recipe) == theirs | {"expert_width": 1.0, "expert_stages": 1}
    named = {"expert_stages": "all", "shortcut": "projection", "classifier": "cosine", "expert_width": 0.5}
    assert network_of(resolve({"method": "diverse", "dataset": "cifar10-lt", **named})) == {"fusion": False} | named
    assert network_of(resolve({"method": "ce", "fusion": True}))["fusion"] is True


def test_what_older_checkpoints_do_not_hold_is_the_methods_own():
    stored = dataclasses.asdict(resolve({"method": "ce"}))
    older = {name: value for name, value in stored.items() if name not in NAMES}
    assert resume_config(older, {}, "last.pt") == resolve({"method": "ce"})
    with pytest.raises(
        CheckpointError, match="belongs to another run: expert_stages is None, the command line says '2'"
    ):
        resume_config(older, {"expert_stages": "2"}, "last.pt")


def test_from_a_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('expert-stages = "2"\nexpert_width = 0.75\nfusion = false\nshortcut = "pad"\n')
    assert settings_from(file, {"shortcut": "projection"}) == {
        "expert_stages": "2",
        "expert_width": 0.75,
        "fusion": False,
        "shortcut": "projection",
    }
    file.write_text("expert_stages = 4")
    with pytest.raises(ConfigError, match="--expert-stages: must be a text, got 4"):
        settings_from(file, {})


def test_a_run_is_trained_resumed_evaluated_and_predicted_with(runs, tmp_path, capsys):
    run = tmp_path / "run"
    assert runs.train(*runs.small, "--epochs", 2, "--experts", 2, *RIDE, "--output-dir", run) == 0
    (run / "last.pt").rename(tmp_path / "whole.pt")  # the checkpoint before it is there
    assert runs.train("--resume", *RIDE, "--output-dir", run) == 0
    runs.assert_same_weights(tmp_path / "whole.pt", run / "last.pt")
    state = runs.checkpoint(run / "last.pt")
    assert {name: state["model_description"][name] for name in NAMES} == RIDE_NETWORK
    assert state["model"]["experts.1.layer3.0.conv1.weight"].shape == (48, 24, 3, 3)
    assert json.loads((run / "config.json").read_text())["expert_stages"] == "2"
    capsys.readouterr()
    assert evaluate(["--checkpoint", str(run / "last.pt")]) == 0
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / "black.png")
    output = tmp_path / "predictions.csv"
    arguments = ["--checkpoint", run / "last.pt", "--images", tmp_path / "images", "--workers", "0", "--output", output]
    assert predict([str(argument) for argument in arguments]) == 0
    assert len(output.read_text().splitlines()) == 2
    assert runs.train("--resume", "--expert-stages", "1", "--output-dir", run) == 2
    assert "expert_stages is '2', the command line says '1'" in capsys.readouterr().err


def test_whole_networks(runs, tmp_path):
    run = tmp_path / "run"
    options = ["--expert-stages", "all", "--no-fusion", "--experts", "2", "--checkpoint-activations"]
    assert runs.train(*runs.small, *options, "--output-dir", run) == 0
    state = runs.checkpoint(run / "last.pt")
    assert state["model_description"]["expert_stages"] == "all"
    stems = [state["model"][f"experts.{k}.stem.conv1.weight"] for k in range(2)]
    assert not torch.equal(*stems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert-stages", "all"], "--model: resnet8 cannot be built for digits-lt with --expert-stages all: "),
        (["--expert-stages", "all"], r"take fusion=False (--no-fusion), or let them share a stage"),
        (
            ["--expert-width", "0.7", "--no-fusion"],
            "with --no-fusion --expert-width 0.7: expert_width must be a factor",
        ),
        (["--model", "resnet50", "--shortcut", "pad"], "resnet50 cannot be built for digits-lt with --shortcut pad: a"),
        (["--shortcut", "pad", "--expert-width", "0.25"], "32 channels cannot become 16; use 'projection'"),
        (
            ["--expert-stages", "3"],
            "with --expert-stages 3: expert_stages must be from 1 to 2, or 'all', got 3",
        ),
        (["--expert-stages", "0"], "--expert-stages: must be a whole number of at least 1, or all, got 0"),
        (["--expert-stages", "two"], "--expert-stages: must be a whole number of at least 1, or all, got two"),
        (["--model", "tim:resnet18"], "--model: must be one of resnet8, "),
        (["--model", "resnet9"], "resnet152, timm:NAME, got 'resnet9'"),
        (["--expert-width", "-1"], "--expert-width: must be a positive number, got -1.0"),
        (["--classifier", "round"], "--classifier: must be one of cosine, linear, got 'round'"),
        (["--shortcut", "none"], "--shortcut: must be one of projection, pad, got 'none'"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_leaves_nothing(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert runs.train(*runs.small, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.rglob("*")) == []
