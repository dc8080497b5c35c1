"""The training command as its user meets it."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch

from shike_fast import data, models
from shike_fast.engine import trainer as trainer_module
from shike_fast.engine.checkpoint import find_resumable
from shike_fast.train import make_parser

# ---------------------------------------------------------------- a finished run


def test_a_run_leaves_all_its_files(finished):
    names = {entry.name for entry in finished.iterdir()}
    expected = {"config.json", "metrics.jsonl", "last.pt", "last.previous.pt", "best.pt"}
    assert expected | {"curves.png", "accuracy_per_class.png", "per_class.csv"} <= names
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


# ---------------------------------------------------------------- bad input


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
        (["--pretrained", "gone.pth"], "gone.pth"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert runs.train(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("arguments", [["--epochs", "ten"], ["--colour", "red"], ["extra"]])
def test_unusable_command_lines(runs, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        runs.train(*arguments)
    assert exit_.value.code == 2
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


# ---------------------------------------------------------------- a loss that is not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(runs, tmp_path, monkeypatch, capsys, bad):
    steps = []
    plain = trainer_module.ops.dkt_loss

    def sometimes_bad(logits, labels, **options):
        loss, terms = plain(logits, labels, **options)
        steps.append(len(labels))
        return (loss * bad, terms) if len(steps) == 9 else (loss, terms)

    monkeypatch.setattr(trainer_module.ops, "dkt_loss", sometimes_bad)
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "the loss is not finite at step 3 of 6 in epoch 2" in errors
    assert f"the last good state is in {tmp_path / 'run' / 'last.pt'}" in errors
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())
    assert len(runs.metrics(tmp_path / "run")) == 1


def test_a_non_finite_loss_in_the_first_epoch_leaves_no_checkpoint(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        trainer_module.ops, "dkt_loss", lambda logits, labels, **options: (logits.sum() * float("nan"), torch.zeros(3))
    )
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "the loss is not finite at step 1 of 6 in epoch 1" in errors
    assert "last good state" not in errors
    assert not (tmp_path / "run" / "last.pt").exists()


# ---------------------------------------------------------------- stop and go on


def test_resume_of_a_finished_run_changes_nothing(runs, tmp_path, capsys):
    runs.train(*runs.small, "--output-dir", tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    table = (tmp_path / "run" / "per_class.csv").read_text()
    capsys.readouterr()
    assert runs.train("--output-dir", tmp_path / "run", "--resume") == 0
    assert "best, epoch" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert (tmp_path / "run" / "per_class.csv").read_text() == table
    assert len(runs.metrics(tmp_path / "run")) == 3


def test_auto_starts_where_there_is_nothing(runs, tmp_path, finished):
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run", "--resume", "auto") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")


def test_auto_still_refuses_a_directory_of_something_else(runs, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert runs.train(*runs.small, "--output-dir", tmp_path, "--resume", "auto") == 2
    assert "is not empty" in capsys.readouterr().err


class StopAfter:
    """Sends a signal to this process once the given number of steps is done."""

    def __init__(self, monkeypatch, steps, number=signal.SIGTERM, method="_step"):
        self.left = steps
        plain = getattr(trainer_module.Trainer, method)

        def counted(trainer, *arguments):
            result = plain(trainer, *arguments)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)
            return result

        monkeypatch.setattr(trainer_module.Trainer, method, counted)


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 12, 14, 17])
def test_stopped_at_any_step_and_resumed_it_ends_the_same(runs, tmp_path, monkeypatch, capsys, finished, steps):
    with monkeypatch.context() as patch:
        StopAfter(patch, steps)
        assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 128 + signal.SIGTERM
    errors = capsys.readouterr().err
    assert errors.startswith(f"stopped by SIGTERM; state saved in {tmp_path / 'run' / 'last.pt'}; go on with")
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert state["epoch"] * 6 + state["batch"] == steps
    assert runs.train("--output-dir", tmp_path / "run", "--resume") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")
    runs.assert_same_weights(finished / "best.pt", tmp_path / "run" / "best.pt")
    assert runs.reproducible_metrics(tmp_path / "run") == runs.reproducible_metrics(finished)
    assert (tmp_path / "run" / "per_class.csv").read_text() == (finished / "per_class.csv").read_text()


def test_stopped_after_the_last_step_it_is_simply_finished(runs, tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        StopAfter(patch, 3, method="_finish_epoch")
        assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")


def test_ctrl_c_saves_too(runs, tmp_path, monkeypatch, capsys):
    StopAfter(monkeypatch, 3, signal.SIGINT)
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 130
    assert "stopped by SIGINT" in capsys.readouterr().err
    assert runs.checkpoint(tmp_path / "run" / "last.pt")["batch"] == 3


def test_resume_from_a_file_into_a_new_directory(runs, tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        StopAfter(patch, 8)
        runs.train(*runs.small, "--output-dir", tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    source = tmp_path / "run" / "last.pt"
    assert runs.train("--resume", source, "--output-dir", tmp_path / "branch") == 0
    assert source.read_bytes() == before
    runs.assert_same_weights(finished / "last.pt", tmp_path / "branch" / "last.pt")
    assert runs.reproducible_metrics(tmp_path / "branch") == runs.reproducible_metrics(finished)


def test_resume_from_a_file_goes_on_in_its_directory(runs, tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        StopAfter(patch, 8)
        runs.train(*runs.small, "--output-dir", tmp_path / "run")
    assert runs.train("--resume", tmp_path / "run" / "last.pt") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")


def test_resume_into_a_used_directory_is_refused(runs, tmp_path, finished, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert runs.train("--resume", finished / "last.pt", "--output-dir", tmp_path / "used") == 2
    assert "is not empty" in capsys.readouterr().err


def test_resume_of_another_model(runs, tmp_path, finished, capsys):
    assert runs.train("--resume", finished / "last.pt", "--model", "resnet32", "--output-dir", tmp_path / "x") == 2
    assert "model is 'resnet8', the command line says 'resnet32'" in capsys.readouterr().err


def test_resume_of_the_best_checkpoint_is_explained(runs, tmp_path, finished, capsys):
    assert runs.train("--resume", finished / "best.pt", "--output-dir", tmp_path / "x") == 2
    assert "holds a model but no training state; resume from last.pt" in capsys.readouterr().err


def test_resume_with_other_images(runs, tmp_path, finished, monkeypatch, capsys):
    plain = data.load_dataset

    def other(*arguments, **options):
        import dataclasses

        return dataclasses.replace(plain(*arguments, **options), fingerprint="other")

    monkeypatch.setattr(data, "load_dataset", other)
    assert runs.train("--resume", finished / "last.pt", "--output-dir", tmp_path / "x") == 2
    assert "was trained on other images than this digits-lt holds" in capsys.readouterr().err


def test_resume_with_a_description_that_does_not_match(runs, tmp_path, finished, capsys):
    state = runs.checkpoint(finished / "last.pt")
    state["model_description"]["scale"] = 12.0
    torch.save(state, tmp_path / "last.pt")
    assert runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "x") == 2
    assert "the checkpoint holds another model: scale is 12.0 there and 30.0 here" in capsys.readouterr().err


def test_resume_with_missing_weights(runs, tmp_path, finished, capsys):
    state = runs.checkpoint(finished / "last.pt")
    del state["model"]["conv1.weight"]
    torch.save(state, tmp_path / "last.pt")
    assert runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "x") == 2
    errors = capsys.readouterr().err
    assert "do not fit its model" in errors
    assert "conv1.weight" in errors
    assert errors.count("\n") == 1


def test_resume_falls_back_when_the_last_checkpoint_is_damaged(runs, tmp_path, finished, capsys):
    runs.train(*runs.small, "--output-dir", tmp_path / "run")
    os.truncate(tmp_path / "run" / "last.pt", 1000)
    capsys.readouterr()
    assert runs.train("--output-dir", tmp_path / "run", "--resume") == 0
    assert re.fullmatch(
        r"warning: checkpoint \S+ is damaged .*; going on from .*last.previous.pt\n", capsys.readouterr().err
    )
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")
    assert runs.reproducible_metrics(tmp_path / "run") == runs.reproducible_metrics(finished)


def test_save_every_saves_within_an_epoch(runs, tmp_path, monkeypatch):
    saved = []
    plain = trainer_module.Trainer._save
    monkeypatch.setattr(trainer_module.Trainer, "_save", lambda t: (saved.append((t.epoch, t.batch)), plain(t))[1])
    runs.train(*runs.small, "--epochs", 2, "--save-every", 4, "--output-dir", tmp_path / "run")
    assert saved == [(0, 4), (1, 0), (1, 4), (2, 0)]


def test_two_processes_cannot_write_one_run(runs, tmp_path, finished):
    first = runs.start(*runs.small, "--epochs", 200, "--output-dir", tmp_path / "run")
    try:
        wait_for(tmp_path / "run" / "last.pt", first)
        second = runs.start("--output-dir", tmp_path / "run", "--resume", "auto")
        _, errors = second.communicate()
        assert second.returncode == 2
        assert "another process is writing to" in errors
    finally:
        first.kill()
        first.communicate()


def wait_for(path, process):
    wait_until(path.exists, process)


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_with_workers(runs, tmp_path, number):
    """The whole process group gets the signal, as from a terminal or a batch system."""
    process = runs.start(
        *runs.small, "--epochs", 500, "--workers", 2, "--output-dir", tmp_path / "run", start_new_session=True
    )
    wait_for(tmp_path / "run" / "last.pt", process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.startswith(f"stopped by {number.name}; state saved in")
    assert errors.count("\n") == 1
    path, state = find_resumable(tmp_path / "run")
    assert path.name == "last.pt"
    assert state["epoch"] >= 1
    assert not [line for line in running_commands() if str(tmp_path) in line]


def running_commands():
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()


# ---------------------------------------------------------------- SIGKILL


KILLS = 10
KILLED_EPOCHS = 36


def test_killed_ten_times_it_ends_bit_identical(runs, tmp_path):
    """SIGKILL at ten random moments, each followed by --resume auto, against one uninterrupted run.

    A run saves after every second step here, so that many of the kills hit a checkpoint that is being written.
    """
    arguments = [*runs.small, "--epochs", KILLED_EPOCHS, "--stage2-epochs", 8, "--save-every", 2, "--resume", "auto"]
    whole = runs.start(*arguments, "--output-dir", tmp_path / "whole", stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "whole" / "metrics.jsonl", whole)
    began = time.monotonic()
    _, errors = whole.communicate()
    training = time.monotonic() - began
    assert whole.returncode == 0, errors

    directory = tmp_path / "killed"
    generator = torch.Generator().manual_seed(0)
    positions = []
    for kill in range(KILLS):
        # however fast the machine is at that moment, the run does not get to its end before the last kill
        most_epochs = (kill + 1) * KILLED_EPOCHS // (KILLS + 1)
        process = runs.start(*arguments, "--output-dir", directory, stdout=subprocess.DEVNULL)
        wait_until(lambda process=process: writes_events(directory, process.pid), process)
        moment = time.monotonic() + training / KILLS * torch.rand((), generator=generator).item()
        while time.monotonic() < moment and len(runs.metrics(directory)) < most_epochs:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.kill()
        process.communicate()
        found = find_resumable(directory)
        positions.append(found[1]["epoch"] * 6 + found[1]["batch"] if found else 0)
    assert positions == sorted(positions)  # no kill lost a finished checkpoint
    assert 0 < positions[-1] < KILLED_EPOCHS * 6

    process = runs.start(*arguments, "--output-dir", directory, stdout=subprocess.DEVNULL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for name in ("last.pt", "best.pt"):
        runs.assert_same_weights(tmp_path / "whole" / name, directory / name)
    assert runs.reproducible_metrics(tmp_path / "whole") == runs.reproducible_metrics(directory)
    for name in ("per_class.csv", "config.json"):
        assert (tmp_path / "whole" / name).read_text() == (directory / name).read_text()
    assert not list(directory.glob(".*.tmp"))


def writes_events(directory, process_id):
    """Whether the process has opened its TensorBoard file, the last thing before the first step."""
    return any(f".{process_id}." in path.name for path in directory.glob("events.out.tfevents.*"))
