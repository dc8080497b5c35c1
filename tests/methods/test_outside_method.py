"""A method that the package does not know, through all commands: ``three_stages.py`` is all that it takes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast import data, methods, models
from shike_fast.data.__main__ import main as data_command
from shike_fast.engine import trainer as trainer_module
from shike_fast.evaluate import main as evaluate
from shike_fast.info import main as info
from shike_fast.methods import registry
from shike_fast.predict import main as predict
from shike_fast.train import main as train

PLUGIN = ["--plugin", "three_stages"]
RUN = [*PLUGIN, "--method", "three-stages", "--model", "resnet8", "--epochs", "4", "--polish-epochs", "1"]


@pytest.fixture
def own(outside):
    shutil.copy(Path(__file__).with_name("three_stages.py"), outside)
    return outside


def forget():
    """As in a process that has not imported the module; the fixture restores all."""
    del sys.modules["three_stages"], registry._METHODS["three-stages"]


def test_it_is_trained_evaluated_and_used(own, runs, capsys):
    assert runs.train(*RUN, "--taus", 0, 2, "--output-dir", own / "run") == 0
    printed = capsys.readouterr().out
    assert "three-stages, resnet8, 2 experts, 1+2+1 epochs" in printed
    assert all(text in printed for text in ("stage 1, epoch 1", "stage 2, epoch 3", "stage 3, epoch 4"))
    rows = runs.metrics(own / "run")
    assert [row["stage"] for row in rows] == [1, 2, 2, 3]
    # a share of the highest rate, the two cosines of the stages before, and the one of its own rate
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.05, 0.1, 0.05])
    assert rows[0]["train_agreement"] == 0 < rows[1]["train_agreement"]  # what the hook says
    for row in rows[:3]:
        assert row["train_adjusted"] + row["train_agreement"] == pytest.approx(row["train_loss"], rel=1e-5)
    assert rows[3]["train_adjusted"] == rows[3]["train_loss"] and "train_agreement" not in rows[3]
    config = json.loads((own / "run" / "config.json").read_text())
    assert (config["taus"], config["batch_size"], config["plugins"]) == ([0, 2], 64, ["three_stages"])
    assert "hardest_weight" not in config

    last = own / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    assert state["config"]["taus"] == (0.0, 2.0) and state["stage"] == 3
    assert evaluate([*PLUGIN, "--checkpoint", str(last), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["top1"], result["stage"], len(result["expert_top1"])) == (rows[3]["top1"], 3, 2)
    assert evaluate([*PLUGIN, "--checkpoint", str(last), "--stage", "4"]) == 2
    assert "was trained with method 'three-stages', which has no stage 4" in capsys.readouterr().err

    (own / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).convert("RGB").save(own / "images" / "a.png")
    arguments = ["--checkpoint", str(last), "--images", str(own / "images"), "--output", str(own / "p.csv")]
    assert predict([*PLUGIN, *arguments, "--workers", "0", "--top", "10"]) == 0
    row = next(csv.DictReader((own / "p.csv").read_text().splitlines()))
    network = models.create_model(**state["model_description"]).eval()
    network.load_state_dict(state["method_state"]["average"])
    mean, std = state["data"]["mean"][0], state["data"]["std"][0]
    image = (torch.from_numpy(pixels).float()[None, None] / 255 - mean) / std
    with torch.no_grad():
        expected = network(image, stage=2).softmax(-1).mean(0)[0]
    assert float(row["probability_1"]) == pytest.approx(expected.max().item(), abs=2e-3)
    assert int(row["class_1"]) == expected.argmax()

    forget()
    for again in (
        lambda: evaluate(["--checkpoint", str(last)]),
        lambda: predict(arguments),
        lambda: train(["--resume", "--output-dir", str(own / "run")]),
    ):
        assert again() == 2
        assert capsys.readouterr().err == (
            f"error: checkpoint {last} holds the method 'three-stages', which is not registered in this process; "
            f"add --plugin three_stages, as the run had; there are {', '.join(methods.list_methods())}\n"
        )
    assert "three_stages" not in sys.modules  # a checkpoint imports nothing


@pytest.mark.slow
def test_stopped_anywhere_it_ends_the_same(own, runs, monkeypatch):
    assert runs.train(*RUN, "--output-dir", own / "whole") == 0
    plain = trainer_module.Trainer._step
    for steps in (3, 7, 20):  # within each stage, of six steps an epoch
        left = [steps]

        def counted(trainer, *arguments, left=left):
            plain(trainer, *arguments)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.Trainer, "_step", counted)
            assert runs.train(*RUN, "--output-dir", own / str(steps)) == 128 + signal.SIGTERM
        assert runs.train(*PLUGIN, "--resume", "--output-dir", own / str(steps)) == 0
        assert_same_run(runs, own / "whole", own / str(steps))


@pytest.mark.slow
def test_killed_it_ends_the_same(own, runs, programs):
    arguments = [*RUN, "--epochs", "12", "--polish-epochs", "3", "--save-every", "2", "--resume", "auto"]
    done = programs.finish(runs.start(*arguments, "--output-dir", "whole", stdout=subprocess.DEVNULL))
    assert done.returncode == 0, done.stderr
    for kill in range(3):
        process = runs.start(*arguments, "--output-dir", "killed", stdout=subprocess.DEVNULL)
        programs.wait_until(lambda kill=kill: runs.epochs(own / "killed") > 3 * kill, process)
        time.sleep(0.01 * kill)
        process.kill()
        programs.finish(process)
    done = programs.finish(runs.start(*arguments, "--output-dir", "killed", stdout=subprocess.DEVNULL))
    assert done.returncode == 0, done.stderr
    assert_same_run(runs, own / "whole", own / "killed")


def assert_same_run(runs, one, other):
    for name in ("last.pt", "best.pt"):
        runs.assert_same_weights(one / name, other / name)
        first, second = (runs.checkpoint(run / name)["method_state"]["average"] for run in (one, other))
        assert not [key for key in first if not torch.equal(first[key], second[key])]
    assert runs.reproducible_metrics(one) == runs.reproducible_metrics(other)


def test_its_average_is_tested_with_and_without_that_of_the_run(own, runs):
    """It follows the weights by ``after_step``."""
    assert runs.train(*RUN, "--output-dir", own / "plain") == 0
    assert runs.train(*RUN, "--ema", 0.9, "--output-dir", own / "averaged") == 0
    assert runs.reproducible_metrics(own / "plain") == runs.reproducible_metrics(own / "averaged")
    first, second = (runs.checkpoint(own / name / "last.pt") for name in ("plain", "averaged"))
    assert "average" in second and "average" not in first
    for name, value in first["method_state"]["average"].items():
        assert torch.equal(second["method_state"]["average"][name], value), name


def test_its_flags(own, capsys):
    assert train([*PLUGIN, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--taus TAUS [TAUS ...]" in printed and "three-stages: experts with a logit adjustment each" in printed
    known = methods.list_methods()
    for arguments, message in (
        (["--method", "three-stages", "--agreement", "-1"], "--agreement: must be a number of at least 0, got -1.0"),
        (["--method", "three-stages", "--decay", "1"], "--decay: must be in [0, 1), got 1.0"),
        (["--agreement", "1"], "--agreement: method 'shike' has no such setting, it belongs to 'three-stages'"),
        (["--method", "ce", "--scale", "1"], "--scale: method 'ce' has no such setting, it belongs to 'shike'"),
        (["--method", "three-stages", "--epochs", "3", "--polish-epochs", "3"], "--polish-epochs: must be at most"),
        (["--method", "three-stage"], f"--method: must be one of {', '.join(known)}, got 'three-stage'"),
    ):
        assert train([*PLUGIN, *arguments, "--output-dir", str(own / "x")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (own / "x").exists()


def example():
    """The module in the docstring of ``register_method``."""
    text = methods.register_method.__doc__.partition("::\n")[2].partition("    Raises:")[0]
    return textwrap.dedent(text)


def test_the_example_of_the_documentation(outside, runs):
    (outside / "my_method.py").write_text(example())
    arguments = ["--plugin", "my_method", "--method", "cautious", "--penalty", 0.3, "--model", "resnet8"]
    assert runs.train(*arguments, "--epochs", 2, "--batch-size", 64, "--output-dir", outside / "run") == 0
    rows = runs.metrics(outside / "run")
    assert [row["stage"] for row in rows] == [1, 1] and rows[0]["train_confidence"] < 0 < rows[0]["train_cross_entropy"]


ALL = """
import dataclasses
from shike_fast import data, models
from shike_fast.data import registry

digits = data.datasets()["digits-lt"]

@data.register_dataset(dataclasses.replace(digits, name="mine"))
def load(info, options):
    return dataclasses.replace(registry._REGISTRY["digits-lt"][1](digits, options), name="mine")

@models.register_model
def own_net(**options):
    return models.create_model("resnet8", **options)
"""


def test_data_sets_and_networks_reach_every_command(outside, runs, capsys):
    (outside / "mine.py").write_text(ALL)
    arguments = ["--plugin", "mine", "--dataset", "mine", "--model", "own_net", "--batch-size", 64, "--epochs", 1]
    assert runs.train(*arguments, "--output-dir", outside / "run") == 0
    assert evaluate(["--plugin", "mine", "--checkpoint", str(outside / "run" / "last.pt")]) == 0
    assert data_command(["check", "--plugin", "mine", "--dataset", "mine"]) == 0
    capsys.readouterr()
    assert info(["--plugin", "mine", "--json"]) == 0
    registered = json.loads(capsys.readouterr().out)["registered"]
    assert "mine" in registered["data sets"] and "own_net" in registered["models"]
    assert registered["methods"] == methods.list_methods()


COMMANDS = {
    "train": (train, []),
    "evaluate": (evaluate, ["--checkpoint", "x.pt"]),
    "predict": (predict, ["--checkpoint", "x.pt", "--images", "y"]),
    "check": (lambda arguments: data_command(["check", *arguments]), ["--dataset", "digits-lt"]),
    "info": (info, []),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_plugins_that_cannot_be_imported(outside, capsys, command):
    main, arguments = COMMANDS[command]
    (outside / "broken.py").write_text("import torch\nraise OSError('no\\nlicence')\n")
    (outside / "needy.py").write_text("import absent_package\n")
    for name, message in (
        (
            "absent",
            "--plugin: there is no module 'absent'; it must lie in this folder or be installed (No module named",
        ),
        ("broken", "--plugin: module 'broken' cannot be imported (OSError: no licence)"),
        (
            "needy",
            "--plugin: module 'needy' cannot be imported (ModuleNotFoundError: No module named 'absent_package')",
        ),
    ):
        assert main([*arguments, "--plugin", name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert main([*arguments, "--plugin"]) == 2
    assert "--plugin: expected one argument" in capsys.readouterr().err


@pytest.mark.slow
def test_an_installed_package_is_a_plugin(own, programs):
    (own / "three_stages-1.dist-info").mkdir()
    (own / "three_stages-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: three_stages\nVersion: 1\n"
    )
    points = own / "three_stages-1.dist-info" / "entry_points.txt"
    points.write_text("[shike_fast.plugins]\nours = three_stages\n")
    done = programs.run([sys.executable, "-m", "shike_fast.info", "--json"], cwd=own)
    assert "three-stages" in json.loads(done.stdout)["registered"]["methods"]
    points.write_text("[shike_fast.plugins]\nours = four_stages\n")
    done = programs.run([sys.executable, "-m", "shike_fast.info"], cwd=own)
    assert done.returncode == 2
    assert done.stderr.startswith("error: entry point 'ours': there is no module 'four_stages'")


def test_the_missing_plugin_of_a_data_set(outside, runs, capsys):
    (outside / "mine.py").write_text(ALL)
    arguments = ["--plugin", "mine", "--dataset", "mine", "--model", "resnet8", "--epochs", 1]
    assert runs.train(*arguments, "--output-dir", outside / "run") == 0
    del sys.modules["mine"], data.registry._REGISTRY["mine"]
    capsys.readouterr()
    assert evaluate(["--checkpoint", str(outside / "run" / "last.pt")]) == 2
    assert capsys.readouterr().err.startswith(
        "error: the data set 'mine' is not registered in this process; add --plugin mine, as the run had; there are"
    )
    assert train(["--config", str(outside / "run" / "config.json")]) == 2
    assert capsys.readouterr().err == (
        f"error: --config: {outside / 'run' / 'config.json'} was written with --plugin mine; add that\n"
    )
