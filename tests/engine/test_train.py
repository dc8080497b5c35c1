"""The training command: what a run does and leaves behind."""

import json
import re

import pytest
import torch

from shike_fast import data, models
from shike_fast.ops import _native_expert, _native_loss
from shike_fast.train import make_parser


def test_a_run_leaves_all_its_files(finished):
    names = {entry.name for entry in finished.iterdir()}
    expected = {"config.json", "metrics.jsonl", "last.pt", "last.previous.pt", "best.pt"}
    assert expected | {"curves.png", "accuracy_per_class.png", "per_class.csv", "report.html"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)


def test_metrics_have_a_line_an_epoch(finished, runs):
    rows = runs.metrics(finished)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["stage"] for row in rows] == [1, 1, 2]
    for row in rows:
        assert row["train_loss"] > 0
        assert row["images_per_second"] > 0
        assert all(0 <= row[name] <= 100 for name in ("top1", "many", "medium", "few", "train_top1"))
    parts = [rows[0][f"train_{name}"] for name in ("cross_entropy", "hardest", "mutual")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(rows[0]["train_loss"], rel=1e-5)
    assert "train_hardest" not in rows[2]


def test_config_says_what_ran(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["dataset"], config["model"], config["epochs"], config["num_experts"]) == (
        "digits-lt",
        "resnet8",
        3,
        3,
    )


def test_best_is_the_best_epoch(finished, runs):
    rows = runs.metrics(finished)
    best = runs.checkpoint(finished / "best.pt")
    assert best["best"]["top1"] == max(row["top1"] for row in rows)
    assert best["epoch"] == best["best"]["epoch"]
    assert best["stage"] == rows[best["epoch"] - 1]["stage"]


def test_tensorboard_has_the_metrics(finished, runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    assert {"train/loss", "train/hardest", "test/top1", "test/few", "run/lr", "run/images_per_second"} <= set(
        events.Tags()["scalars"]
    )
    written = [(scalar.step, scalar.value) for scalar in events.Scalars("test/top1")]
    assert written == [(row["epoch"], pytest.approx(row["top1"])) for row in runs.metrics(finished)]


def test_stage_2_trains_the_second_classifiers_alone(runs, tmp_path):
    assert runs.train(*runs.small, "--epochs", 2, "--stage2-epochs", 1, "--output-dir", tmp_path / "run") == 0
    before = runs.checkpoint(tmp_path / "run" / "last.previous.pt")
    after = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert (before["stage"], after["stage"]) == (1, 2)
    changed = {name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])}
    weights = {name for name in changed if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert weights == {"rt_classifiers.weight"}
    # each optimizer holds what its stage trains and no more: a frozen parameter is not even decayed
    parameters = dict(models.create_model(**after["model_description"]).named_parameters())
    held = [len(state["optimizer"]["param_groups"][0]["params"]) for state in (before, after)]
    assert held == [len(parameters) - 1, 1]
    # as published, BatchNorm goes on averaging its statistics
    assert any(name.endswith("running_mean") for name in changed)


def test_stage_1_leaves_the_second_classifiers_alone(runs, tmp_path):
    assert runs.train(*runs.small, "--epochs", 1, "--stage2-epochs", 0, "--output-dir", tmp_path / "run") == 0
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    torch.manual_seed(0)
    untouched = models.create_model(**state["model_description"]).state_dict()
    assert torch.equal(state["model"]["rt_classifiers.weight"], untouched["rt_classifiers.weight"])
    assert not torch.equal(state["model"]["classifiers.weight"], untouched["classifiers.weight"])


def test_ce_is_a_plain_network(runs, tmp_path, capsys):
    arguments = ["--method", "ce", "--model", "resnet8", "--epochs", "2", "--output-dir", tmp_path / "run"]
    assert runs.train(*arguments) == 0
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert state["model_description"]["num_experts"] == 1
    assert state["model_description"]["classifier"] == "linear"
    assert not any("fusion" in name for name in state["model"])
    assert [row["stage"] for row in runs.metrics(tmp_path / "run")] == [1, 1]
    assert "ce, resnet8, 1 expert, 2+0 epochs" in capsys.readouterr().out


def test_output_names_the_run_and_every_epoch(runs, tmp_path, capsys):
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "digits-lt: 383 training images, 10 classes of 114 to 5, 600 test images" in printed
    for epoch, stage in ((1, 1), (2, 1), (3, 2)):
        line = (
            rf"epoch {epoch}/3 stage {stage}  loss [\d.]+  train [\d.]+%  top-1 [\d.]+%  many/medium/few [\d./]+  lr "
        )
        assert re.search(line, printed)
    assert "stage 1, epoch 2" in printed
    assert "stage 2, epoch 3" in printed
    assert "best, epoch" in printed
    assert str(tmp_path / "run") in printed


def test_default_directory(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.train(*runs.small, "--epochs", 1) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-lt-shike-\d{8}-\d{6}", directory.name)
    assert (directory / "last.pt").exists()


def test_same_seed_same_run_another_seed_another(runs, tmp_path, finished):
    runs.train(*runs.small, "--seed", 0, "--deterministic", "--output-dir", tmp_path / "same")
    runs.train(*runs.small, "--seed", 1, "--output-dir", tmp_path / "other")
    runs.assert_same_weights(finished / "last.pt", tmp_path / "same" / "last.pt")
    assert runs.reproducible_metrics(finished) == runs.reproducible_metrics(tmp_path / "same")
    assert runs.reproducible_metrics(finished) != runs.reproducible_metrics(tmp_path / "other")
    torch.use_deterministic_algorithms(False)


def test_workers_change_nothing(runs, tmp_path, finished):
    assert runs.train(*runs.small, "--workers", 2, "--output-dir", tmp_path / "run") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(runs, tmp_path, amp):
    assert runs.train(*runs.small, "--amp", amp, "--epochs", 2, "--output-dir", tmp_path / "run") == 0
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert all(
        value.dtype != getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[amp]) for value in state["model"].values()
    )
    assert bool(state["scaler"]) == (amp == "fp16")
    assert runs.metrics(tmp_path / "run")[0]["train_loss"] < 40


def test_command_line_overrides_the_recipe(runs, tmp_path):
    overrides = {
        "--experts": 2,
        "--lr": 0.01,
        "--stage2-lr": 0.02,
        "--weight-decay": 0.001,
        "--momentum": 0.5,
        "--warmup-epochs": 0,
        "--hardest-weight": 2,
        "--mutual-weight": 3,
        "--scale": 20,
        "--kl-reduction": "batchmean",
        "--imbalance-factor": 50,
        "--augmentation": "none",
    }
    flat = [item for pair in overrides.items() for item in pair]
    assert runs.train(*runs.small, *flat, "--epochs", 1, "--stage2-epochs", 0, "--output-dir", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    names = {"--experts": "num_experts"}
    for flag, value in overrides.items():
        assert config[names.get(flag, flag[2:].replace("-", "_"))] == value
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert state["model"]["classifiers.weight"].shape[0] == 2
    assert state["model_description"]["scale"] == 20
    assert int(state["data"]["class_counts"].min()) == 114 // 50
    (group,) = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.5, 0.001, 0.01)


def test_pretrained_weights_are_loaded(runs, tmp_path):
    donor = models.create_model("resnet8", num_classes=10, num_experts=1, in_channels=1, fusion=False)
    torch.manual_seed(5)
    weights = {}
    for name, value in donor.state_dict().items():
        if name.startswith(("classifiers", "rt_classifiers")):
            continue
        weights[name.replace("experts.0.", "layer3.")] = torch.rand_like(value) if value.is_floating_point() else value
    torch.save(weights, tmp_path / "weights.pth")
    arguments = ["--pretrained", tmp_path / "weights.pth", "--lr", 1e-30, "--weight-decay", 0]
    assert runs.train(*runs.small, "--epochs", 1, *arguments, "--output-dir", tmp_path / "run") == 0
    trained = runs.checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert torch.equal(trained["conv1.weight"], weights["conv1.weight"])


def test_help_lists_data_sets_and_recipes(capsys):
    with pytest.raises(SystemExit) as exit_:
        make_parser().parse_args(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for name in data.datasets():
        assert name in printed


def test_training_uses_the_fused_losses(runs, tmp_path, monkeypatch):
    calls = []

    def recorded(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or function(*args))

    for module, name in ((_native_loss, "dkt_both"), (_native_expert, "expert_both")):  # forward and backward at once
        recorded(module, name)
    assert runs.train("--output-dir", tmp_path / "run", "--model", "resnet8", "--epochs", 2) == 0
    assert calls.count("dkt_both") > 0  # stage 1
    assert calls.count("expert_both") > 0  # stage 2
