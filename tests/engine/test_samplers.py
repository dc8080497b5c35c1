"""``--sampler`` and the samplers of stages, from the settings to the batches of a run."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from shike_fast import ops
from shike_fast.data import SAMPLERS
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.engine import trainer as trainer_module
from shike_fast.engine.config import resolve
from shike_fast.engine.setup import check_setting, make_loader, stage_sampler
from shike_fast.engine.state import load_data
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage, registry

CPU = torch.device("cpu")
FIRST = Stage("first")
SECOND = Stage("second", epochs="stage2_epochs", lr="stage2_lr", sampler="class-aware")


class Retrained(Method):
    name = "retrained"
    summary = "two stages that draw differently"
    stages = (FIRST, SECOND)
    experts = 1

    @classmethod
    def model_options(cls, settings):
        return {"fusion": False, "classifier": "linear"}

    def loss(self, logits, target, *, stage=FIRST, epoch=0, **inputs):
        return ops.expert_cross_entropy(logits, target), {}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method(Retrained)


@pytest.fixture(scope="module")
def digits():
    return load_data(resolve({}))


@pytest.fixture
def drawn(monkeypatch):
    """The labels of each epoch of a run."""
    epochs: dict[int, list[int]] = {}
    plain = trainer_module.Trainer._step

    def watch(trainer, images, labels):
        epochs.setdefault(trainer.epoch, []).extend(labels.tolist())
        plain(trainer, images, labels)

    monkeypatch.setattr(trainer_module.Trainer, "_step", watch)
    return epochs


RUN = ["--method", "retrained", "--model", "resnet8", "--batch-size", 96, "--epochs", 3, "--stage2-epochs", 1]


def test_a_stage_has_its_own_sampler(runs, tmp_path, drawn, digits):
    assert runs.train(*RUN, "--output-dir", tmp_path / "run") == 0
    counts = {epoch: np.bincount(labels, minlength=10) for epoch, labels in drawn.items()}
    for epoch in (0, 1):
        assert counts[epoch].tolist() == digits.class_counts.tolist()
    assert counts[2].sum() == 383 and counts[2].max() - counts[2].min() <= 4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sampler"] == "instance"


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_trains_and_resumes_bit_for_bit(runs, tmp_path, monkeypatch, name):
    arguments = [*RUN, "--sampler", name, "--method", "ce", "--stage2-epochs", 0]
    assert runs.train(*arguments, "--output-dir", tmp_path / "whole") == 0
    plain, left = trainer_module.Trainer._step, [6]

    def counted(trainer, images, labels):
        plain(trainer, images, labels)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_step", counted)
        assert runs.train(*arguments, "--output-dir", tmp_path / "stopped") == 128 + signal.SIGTERM
    assert runs.train("--resume", "--output-dir", tmp_path / "stopped") == 0
    runs.assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "stopped" / "last.pt")
    assert runs.reproducible_metrics(tmp_path / "whole") == runs.reproducible_metrics(tmp_path / "stopped")


def test_another_sampler_is_another_run(runs, tmp_path, capsys):
    assert runs.train(*RUN, "--epochs", 1, "--stage2-epochs", 0, "--output-dir", tmp_path / "run") == 0
    capsys.readouterr()
    assert runs.train("--resume", "--sampler", "square-root", "--output-dir", tmp_path / "run") == 2
    assert "sampler is 'instance', the command line says 'square-root'" in capsys.readouterr().err


def test_progressive_counts_the_epochs_of_a_stage(digits, monkeypatch):
    monkeypatch.setattr(Retrained, "stages", (FIRST, dataclasses.replace(SECOND, sampler=None)))
    config = resolve({"method": "retrained", "sampler": "progressive", "epochs": 7, "stage2_epochs": 3})
    sizes = digits.class_counts.numpy() / 383
    for stage, epochs in ((1, range(4)), (2, range(4, 7))):
        sampler = stage_sampler(config, digits, stage)
        np.testing.assert_allclose(sampler.probabilities(epochs[0]), sizes)
        np.testing.assert_allclose(sampler.probabilities(epochs[-1]), 0.1)
    assert stage_sampler(dataclasses.replace(config, stage2_epochs=0), digits, 2).probabilities(6).sum() == 1


def test_samplers_that_do_not_fit(runs, tmp_path, capsys, digits):
    assert runs.train("--sampler", "cyclic", "--output-dir", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        "error: --sampler: must be one of instance, class-aware, square-root, progressive, got 'cyclic'\n"
    )
    for stage in (Stage("a", sampler="cyclic"), Stage("a", sampler="")):
        wrong = type("Wrong", (Retrained,), {"name": "wrong", "stages": (stage,)})
        with pytest.raises(ValueError, match=r"unknown sampler '(cyclic)?'; choose one of instance, class-aware, squ"):
            registry.register_method(wrong)
    empty = ArrayDataset(np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64), mean=(0.5,), std=(0.5,))
    config = resolve({"sampler": "square-root"})
    with pytest.raises(ConfigError, match="--sampler: sampler 'square-root' needs at least one image"):
        make_loader(config, dataclasses.replace(digits, train=empty), CPU, train=True)


def test_a_data_set_that_cannot_show_an_image_again(digits):
    class Plain(ArrayDataset):
        def batch(self, indices, *, seed, epoch):
            return super().batch(indices, seed=seed, epoch=epoch)

    train = Plain(digits.train.images, digits.train.labels, mean=(0.5,), std=(0.5,))
    plain = dataclasses.replace(digits, train=train)
    check_setting(resolve({"method": "ce"}), plain, CPU)
    for given, name in (({"method": "ce", "sampler": "square-root"}, "square-root"), ({}, "class-aware")):
        with pytest.raises(ConfigError, match=f"--sampler: '{name}' draws an image of digits-lt more than once"):
            check_setting(resolve({"method": "retrained"} | given), plain, CPU)
