"""Every method through the commands: trained, stopped and resumed, evaluated, used; on digits, with its own recipe."""

import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast import methods
from shike_fast.engine import trainer as trainer_module
from shike_fast.evaluate import main as evaluate
from shike_fast.methods.ride import load_teacher
from shike_fast.predict import main as predict

SMALL = ["--model", "resnet8", "--batch-size", 64, "--epochs", 3, "--threads", 1]  # six steps an epoch
OWN_STATE = ["tcl", "ncm"]  # methods with sums over all processes


def stop_after(monkeypatch, steps):
    """Send SIGTERM to this process once so many steps are done."""
    plain, done = trainer_module.Trainer._step, []

    def counted(trainer, *arguments):
        plain(trainer, *arguments)
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer_module.Trainer, "_step", counted)


def assert_same(one, other):
    """Nested dictionaries of tensors."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    else:
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in methods.list_methods() if name not in ("shike", "ce")])
def test_it_is_trained_resumed_evaluated_and_used(name, runs, tmp_path, monkeypatch, capsys):
    arguments = ["--method", name, *SMALL]
    assert runs.train(*arguments, "--output-dir", tmp_path / "whole") == 0
    rows = runs.metrics(tmp_path / "whole")
    assert len(rows) == 3 and all(math.isfinite(row["train_loss"]) for row in rows)
    kind = methods.find_method(name)
    assert [row["stage"] for row in rows] == ([1, 1, 1] if len(kind.stages) == 1 else [1, 1, 2])
    for row in rows:
        assert {f"train_{term}" for term in kind.stages[row["stage"] - 1].terms} <= row.keys()

    for steps in (8, 14):  # within the first stage, and within the second where there is one
        folder = tmp_path / f"stopped-{steps}"
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert runs.train(*arguments, "--output-dir", folder) == 128 + signal.SIGTERM
        assert runs.train("--output-dir", folder, "--resume") == 0
        assert_same(*(runs.checkpoint(path / "last.pt")["model"] for path in (folder, tmp_path / "whole")))
        whole, stopped = (runs.checkpoint(path / "last.pt") for path in (tmp_path / "whole", folder))
        assert_same(whole.get("method_state", {}), stopped.get("method_state", {}))
        assert runs.reproducible_metrics(folder) == runs.reproducible_metrics(tmp_path / "whole")

    capsys.readouterr()
    last = str(tmp_path / "whole" / "last.pt")
    assert evaluate(["--checkpoint", last, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == rows[-1]["top1"]
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "images" / "a.png")
    named = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "p.csv"), "--workers", "0"]
    assert predict(["--checkpoint", last, *named]) == 0
    assert (tmp_path / "p.csv").read_text().count("\n") == 2


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
    """Five training images and one test image of each class, in the binary form."""
    folder = tmp_path_factory.mktemp("data") / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, each in (("train.bin", 5), ("test.bin", 1)):
        labels = np.repeat(np.arange(100, dtype=np.uint8), each)
        pixels = rng.integers(0, 256, (len(labels), 3072), np.uint8)
        (folder / name).write_bytes(np.column_stack([labels // 5, labels, pixels]).tobytes())
    return folder.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.list_methods())
def test_its_recipe_for_cifar_trains(name, runs, cifar100, tmp_path):
    """The published setting but for the size of the network and the length of the run."""
    arguments = ["--dataset", "cifar100-lt", "--data-dir", cifar100, "--no-verify", "--imbalance-factor", 5]
    short = ["--model", "resnet8", "--epochs", 3, "--threads", 1, "--batch-size", 32]
    assert runs.train("--method", name, *arguments, *short, "--output-dir", tmp_path / "run") == 0
    assert all(math.isfinite(row["train_loss"]) for row in runs.metrics(tmp_path / "run"))
    config = runs.checkpoint(tmp_path / "run" / "last.pt")["config"]
    for key, value in methods.find_method(name).recipes.get("cifar100-lt", {}).items():
        if key not in ("model", "epochs", "stage2_epochs", "batch_size", "step_epochs"):
            assert config[key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OWN_STATE, "mdcs", "ncl++", "lws"])
def test_two_processes_train_like_one(name, runs, programs, tmp_path):
    # more threads, or larger steps, would magnify the rounding
    arguments = ["--method", name, *SMALL, "--epochs", 2, "--lr", 0.001, "--stage2-lr", 0.001, "--sync-batch-norm"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--local-addr", "localhost", "-m", "shike_fast.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = programs.run([*launcher, *arguments, "--output-dir", tmp_path / "two"], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert runs.train(*arguments, "--output-dir", tmp_path / "one") == 0
    two, one = (runs.metrics(tmp_path / folder) for folder in ("two", "one"))
    if name != "mdcs":  # its mean over the images that are right is one over those of a process
        assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], rel=1e-3)
    if name in OWN_STATE:
        states = [runs.checkpoint(tmp_path / folder / "last.pt") for folder in ("two", "one")]
        kept = [
            state["method_state"]["accuracy"] if name == "tcl" else state["model"]["rt_classifiers.sums"]
            for state in states
        ]
        assert kept[0].any() and torch.allclose(*kept, atol=0.05)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from shike_fast.train import main

    folder = tmp_path_factory.mktemp("teacher") / "run"
    arguments = ["--method", "lws", *SMALL, "--epochs", "2", "--output-dir", folder]
    assert main([str(one) for one in arguments]) == 0
    return folder / "last.pt"


@pytest.mark.slow
def test_a_teacher_of_another_method_distills(teacher, runs, tmp_path, monkeypatch):
    arguments = ["--method", "ride", *SMALL, "--epochs", 2, "--teacher", teacher]
    assert runs.train(*arguments, "--output-dir", tmp_path / "whole") == 0
    rows = runs.metrics(tmp_path / "whole")
    assert all(row["train_distillation"] > 0 for row in rows)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert runs.train(*arguments, "--output-dir", tmp_path / "stopped") == 128 + signal.SIGTERM
    assert runs.train("--output-dir", tmp_path / "stopped", "--resume") == 0
    runs.assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "stopped" / "last.pt")
    teacher.rename(teacher.with_name("gone.pt"))
    try:
        assert evaluate(["--checkpoint", str(tmp_path / "whole" / "last.pt")]) == 0  # which needs no teacher
    finally:
        teacher.with_name("gone.pt").rename(teacher)


@pytest.mark.slow
def test_the_network_of_a_teacher(teacher):
    network = load_teacher(str(teacher), 10)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    images = torch.randn(3, 1, 8, 8)
    inner = network.network
    assert torch.equal(network(images), inner(images, stage=2))  # the classifiers that the run ended with
    with pytest.raises(ValueError, match=r"--teacher: the network of .* has 10 classes, the data 7"):
        load_teacher(str(teacher), 7)


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_a_file_that_is_no_teacher(content, runs, tmp_path, capsys):
    file = tmp_path / "teacher.pt"
    if content is not None:
        file.write_bytes(content)
    status = runs.train("--method", "ride", *SMALL, "--teacher", file, "--output-dir", tmp_path / "run")
    assert status == 2 and not (tmp_path / "run").exists()
    assert f"error: --teacher: {file} is no checkpoint of a trained network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("lws", "cosine", "--method: 'lws' needs a network with linear classifiers, got CosineClassifier"),
        ("ncm", "cosine", "--method: 'ncm' needs a network with linear classifiers, got CosineClassifier"),
        ("reslt", "cosine", "--method: 'reslt' needs a network with linear classifiers, got CosineClassifier"),
        ("tau-norm", "cosine", "--method: 'tau-norm' needs a network with linear classifiers, got CosineClassifier"),
        ("ldam-drw", "linear", "--method: 'ldam-drw' needs a network with cosine classifiers, got LinearClassifier"),
    ],
)
def test_heads_that_do_not_fit(method, option, message, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    assert runs.train("--method", method, *SMALL, "--classifier", option, "--output-dir", folder) == 2
    assert message in capsys.readouterr().err and not folder.exists()


def test_numbers_of_experts_that_do_not_fit(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    assert runs.train("--method", "mdcs", "--experts", 2, "--epochs", 1, "--output-dir", folder) == 2
    assert "--exponents: method 'mdcs' needs a number for each of its 2 experts" in capsys.readouterr().err
    assert not folder.exists()
