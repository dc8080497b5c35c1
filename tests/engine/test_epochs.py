"""The steps of a run's learning rate: where they fall in its stages, and what is refused."""

import dataclasses

import pytest

from shike_fast import methods, ops
from shike_fast.engine.config import resolve, stored_config
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage, option, registry

CIFAR = {"method": "ce", "dataset": "cifar100-lt", "schedule": "step"}


@pytest.fixture
def define(monkeypatch):
    """``define(stages, ...)``: a method that only this test knows."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def register(*stages, **content):
        def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
            return ops.expert_cross_entropy(logits, target), {}

        usual = {"name": "own", "summary": "a test", "stages": stages, "loss": loss}
        return methods.register_method(type("Own", (Method,), usual | content))

    return register


def test_the_usual_steps_are_at_the_published_shares():
    config = resolve(CIFAR)
    assert (config.schedule, config.step_epochs, config.step_factor) == ("step", (160, 180), 0.1)
    assert resolve(CIFAR | {"epochs": 40}).step_epochs == (32, 36)
    assert resolve(CIFAR | {"epochs": 1}).step_epochs == ()
    assert resolve({}).schedule == "cosine" and resolve({}).step_epochs is None


def test_given_steps():
    given = {"epochs": 10, "step_epochs": [4, 4, 8], "step_factor": 0.5, "lr": 0.8, "warmup_epochs": 2}
    config = resolve(CIFAR | given)
    rates = [config.lr_of(epoch) for epoch in range(10)]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1])
    assert stored_config(dataclasses.asdict(config), "last.pt") == config


def test_steps_of_a_recipe_keep_their_share(define):
    recipe = {"epochs": 300, "schedule": "step", "step_epochs": [200, 280], "step_factor": 0.01}
    define(Stage("one"), recipes={"cifar100-lt": recipe})
    own = {"method": "own", "dataset": "cifar100-lt"}
    assert resolve(own).step_epochs == (200, 280)
    short = resolve(own | {"epochs": 30})
    assert short.step_epochs == (20, 28)
    assert [short.lr_of(epoch) / short.lr for epoch in (4, 5, 19, 20, 27, 28)] == pytest.approx(
        [1, 1, 1, 1e-2, 1e-2, 1e-4]
    )
    assert resolve(own | {"epochs": 30, "step_epochs": [7]}).step_epochs == (7,)
    cosine = resolve(own | {"schedule": "cosine"})
    assert cosine.step_epochs is None and cosine.lr_of(299) < 1e-4 * cosine.lr


def test_stages_name_their_schedule_and_share_the_steps(define):
    """The steps are epochs of the stage that has no length; the others step at the same shares of theirs."""
    define(
        Stage("first", epochs=0.2, schedule="cosine"),
        Stage("main"),
        Stage("last", epochs="last_epochs", schedule="step", lr="last_lr"),
        __annotations__={"last_epochs": "int", "last_lr": "float"},
        last_epochs=option(20),
        last_lr=option(0.4),
    )
    own = {"method": "own", "dataset": "cifar100-lt", "epochs": 75, "last_epochs": 20, "lr": 1.0, "warmup_epochs": 0}
    config = resolve(own)
    assert (config.stage_epochs, config.step_epochs) == ((15, 40, 20), (32, 36))
    assert config.lr_of(54) < 0.01  # the end of a cosine
    assert [config.lr_of(epoch) for epoch in (55, 70, 71, 72, 73, 74)] == pytest.approx(
        [0.4, 0.4, 0.04, 0.04, 0.004, 0.004]
    )
    config = resolve(own | {"schedule": "step", "step_epochs": [20]})
    assert [config.lr_of(epoch) for epoch in (15, 34, 35, 54, 55, 64, 65)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.4, 0.4, 0.04]
    )
    assert config.lr_of(14) < 0.02 < config.lr_of(13)


def test_a_schedule_that_is_none(define):
    define(Stage("one", schedule="linear"))
    with pytest.raises(
        ConfigError, match="method 'own': its stage one names the schedule linear, there are cosine, step"
    ):
        resolve({"method": "own"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "linear"}, "--schedule: must be one of cosine, step, got 'linear'"),
        (
            {"schedule": "cosine", "step_epochs": [4]},
            "--step-epochs: the learning rate follows a cosine; add --schedule",
        ),
        ({"step_epochs": [0]}, "--step-epochs: must be at least 1, got 0"),
        ({"step_epochs": [8, 4]}, "--step-epochs: must be rising numbers of epochs from 1 to 9, got 8 4"),
        ({"step_epochs": [4, 10]}, "--step-epochs: must be rising numbers of epochs from 1 to 9, got 4 10"),
        ({"step_factor": 0.0}, "--step-factor: must be a positive number, got 0.0"),
    ],
)
def test_steps_that_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve(CIFAR | {"epochs": 10} | given)


def test_a_run_in_steps(runs, tmp_path):
    arguments = ["--method", "ce", "--model", "resnet8", "--epochs", 4, "--schedule", "step", "--step-epochs", 2, 3]
    assert runs.train(*arguments, "--lr", 0.1, "--step-factor", 0.5, "--output-dir", tmp_path / "run") == 0
    rates = [row["lr"] for row in runs.metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.05, 0.1, 0.05, 0.025])  # a warm-up of two epochs, half of the stage
