"""Stop a run, kill it, go on with it: it ends as if nothing had happened."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import SMALL

from shike_fast import data
from shike_fast.engine import trainer as trainer_module
from shike_fast.engine.checkpoint import find_resumable
from shike_fast.train import main


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


RECIPES = {
    "mixed": "--method ce --epochs 3 --mixup 0.4 --cutmix 1 --unmixed-epochs 1 --ema 0.9 --nesterov --schedule step "
    "--step-epochs 1 2 --trunk-lr 0.02",
    "two stages": "--epochs 3 --stage2-epochs 1 --ema 0.9 --schedule step --trunk-lr 0.02",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs with all that the engine has besides."""
    directories = {}
    for name, options in RECIPES.items():
        directories[name] = tmp_path_factory.mktemp("whole") / "run"
        arguments = [*SMALL[:4], *options.split(), "--output-dir", str(directories[name])]
        assert main(arguments) == 0
    return directories


@pytest.mark.parametrize(("name", "steps"), [("mixed", 2), ("mixed", 8), ("mixed", 15), ("two stages", 14)])
def test_all_that_a_run_may_have_is_resumed(runs, tmp_path, monkeypatch, whole, name, steps):
    with monkeypatch.context() as patch:
        StopAfter(patch, steps)
        arguments = [*SMALL[:4], *RECIPES[name].split(), "--output-dir", tmp_path / "run"]
        assert runs.train(*arguments) == 128 + signal.SIGTERM
    assert runs.train("--output-dir", tmp_path / "run", "--resume") == 0
    for file in ("last.pt", "best.pt"):
        runs.assert_same_weights(whole[name] / file, tmp_path / "run" / file)
    assert runs.reproducible_metrics(tmp_path / "run") == runs.reproducible_metrics(whole[name])


def test_what_a_run_may_have_cannot_change_on_resume(runs, tmp_path, whole, capsys):
    for option, value in (("--ema", 0.8), ("--mixup", 0.2), ("--trunk-lr", 0.01), ("--step-epochs", 2)):
        again = runs.train("--resume", whole["mixed"] / "last.pt", option, value, "--output-dir", tmp_path / "x")
        assert again == 2
        name = option.removeprefix("--").replace("-", "_")
        assert f"belongs to another run: {name} is" in capsys.readouterr().err


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


def test_resume_from_a_file_brings_the_best_model_along(runs, tmp_path, finished):
    assert runs.train("--resume", finished / "last.pt", "--output-dir", tmp_path / "copy") == 0
    assert (tmp_path / "copy" / "best.pt").read_bytes() == (finished / "best.pt").read_bytes()
    assert runs.metrics(tmp_path / "copy") == runs.metrics(finished)
    runs.assert_same_weights(tmp_path / "copy" / "last.pt", finished / "last.pt")


def test_resume_without_the_best_model_says_so(runs, tmp_path, finished, capsys):
    (tmp_path / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    assert runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "copy") == 0
    printed = capsys.readouterr().out
    assert "no best.pt of epochs 1 to 3 at hand" in printed
    assert "best, epoch" not in printed


def test_resume_from_a_renamed_file_needs_a_directory(runs, tmp_path, finished, capsys):
    """Its folder may be anybody's."""
    (tmp_path / "model.pt").write_bytes((finished / "last.pt").read_bytes())
    (tmp_path / "config.json").write_text("precious")
    assert runs.train("--resume", tmp_path / "model.pt") == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "precious"


def test_resume_with_a_training_state_that_does_not_fit(runs, tmp_path, finished, capsys):
    state = runs.checkpoint(finished / "last.pt")
    state["optimizer"] = {"state": {}}
    torch.save(state, tmp_path / "last.pt")
    assert runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "x") == 2
    assert "the checkpoint's training state does not fit its model" in capsys.readouterr().err


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
        return dataclasses.replace(plain(*arguments, **options), fingerprint="other")

    monkeypatch.setattr(data, "load_dataset", other)
    assert runs.train("--resume", finished / "last.pt", "--output-dir", tmp_path / "x") == 2
    assert "was trained on other images than this digits-lt holds" in capsys.readouterr().err


def test_resume_with_a_description_that_does_not_match(runs, tmp_path, finished, capsys):
    state = runs.checkpoint(finished / "last.pt")
    state["model_description"]["scale"] = 12.0
    torch.save(state, tmp_path / "last.pt")
    assert runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "x") == 2
    assert "the checkpoint holds another model: scale is 12.0 there and 16.0 here" in capsys.readouterr().err


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
    assert saved == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]


def test_two_processes_cannot_write_one_run(runs, programs, tmp_path, finished):
    first = runs.start(*runs.small, "--epochs", 2000, "--output-dir", tmp_path / "run", stdout=subprocess.DEVNULL)
    programs.wait_until((tmp_path / "run" / "last.pt").exists, first)
    second = programs.finish(runs.start("--output-dir", tmp_path / "run", "--resume", "auto"))
    assert second.returncode == 2
    assert "another process is writing to" in second.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_from_outside_with_workers(runs, programs, tmp_path, number):
    """The whole process group gets the signal, as from a terminal or a batch system."""
    process = runs.start(*runs.small, "--epochs", 500, "--workers", 2, "--output-dir", tmp_path / "run")
    programs.wait_until(lambda: runs.epochs(tmp_path / "run"), process)
    os.killpg(process.pid, number)
    done = programs.finish(process)
    assert done.returncode == 128 + number
    assert done.stderr.startswith(f"stopped by {number.name}; state saved in")
    assert done.stderr.count("\n") == 1
    path, state = find_resumable(tmp_path / "run")
    assert path.name == "last.pt"
    assert state["epoch"] >= 1
    with pytest.raises(ProcessLookupError):  # nor is a worker left
        os.killpg(process.pid, 0)


KILLS = 10
KILLED_EPOCHS = 36


@pytest.mark.slow
def test_killed_ten_times_it_ends_bit_identical(runs, programs, tmp_path):
    """SIGKILL at ten random moments, each followed by --resume auto, against one uninterrupted run.

    A run saves after every second step here, so that many of the kills hit a checkpoint that is being written.
    """
    arguments = [*runs.small, "--epochs", KILLED_EPOCHS, "--stage2-epochs", 8, "--save-every", 2, "--resume", "auto"]
    whole = runs.start(*arguments, "--output-dir", tmp_path / "whole", stdout=subprocess.DEVNULL)
    programs.wait_until((tmp_path / "whole" / "metrics.jsonl").exists, whole)
    began = time.monotonic()
    done = programs.finish(whole)
    training = time.monotonic() - began
    assert done.returncode == 0, done.stderr

    directory = tmp_path / "killed"
    generator = torch.Generator().manual_seed(0)
    positions = []
    for kill in range(KILLS):
        # however fast the machine is at that moment, the run does not get to its end before the last kill
        most_epochs = (kill + 1) * KILLED_EPOCHS // (KILLS + 1)
        process = runs.start(*arguments, "--output-dir", directory, stdout=subprocess.DEVNULL)
        programs.wait_until(lambda process=process: writes_events(directory, process.pid), process)
        moment = time.monotonic() + training / KILLS * torch.rand((), generator=generator).item()
        while time.monotonic() < moment and runs.epochs(directory) < most_epochs:
            assert process.poll() is None, programs.finish(process)
            time.sleep(0.002)
        process.kill()
        programs.finish(process)
        found = find_resumable(directory)
        positions.append(found[1]["epoch"] * 6 + found[1]["batch"] if found else 0)
    assert positions == sorted(positions)  # no kill lost a finished checkpoint
    assert 0 < positions[-1] < KILLED_EPOCHS * 6

    done = programs.finish(runs.start(*arguments, "--output-dir", directory, stdout=subprocess.DEVNULL))
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "best.pt"):
        runs.assert_same_weights(tmp_path / "whole" / name, directory / name)
    assert runs.reproducible_metrics(tmp_path / "whole") == runs.reproducible_metrics(directory)
    for name in ("per_class.csv", "config.json"):
        assert (tmp_path / "whole" / name).read_text() == (directory / name).read_text()
    assert not list(directory.glob(".*.tmp"))


def writes_events(directory, process_id):
    """Whether the process has opened its TensorBoard file, the last thing before the first step."""
    return any(f".{process_id}." in path.name for path in directory.glob("events.out.tfevents.*"))


_STUCK = """
import sys, time
from shike_fast.engine.trainer import Trainer
from shike_fast.train import main
Trainer._step = lambda *_: time.sleep(600)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_in_the_first_epoch(runs, programs, tmp_path, finished):
    directory = tmp_path / "run"
    process = programs.start([sys.executable, "-c", _STUCK, *runs.small, "--output-dir", directory])
    programs.wait_until(lambda: writes_events(directory, process.pid), process)
    process.kill()
    programs.finish(process)
    assert runs.checkpoint(directory / "last.pt")["epoch"] == 0
    assert runs.train("--output-dir", directory, "--resume") == 0
    runs.assert_same_weights(finished / "last.pt", directory / "last.pt")


def test_killed_while_the_first_checkpoint_was_written(runs, tmp_path, finished):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".last.pt.tmp").write_bytes(b"half a checkpoint")
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run", "--resume", "auto") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")
    assert not (tmp_path / "run" / ".last.pt.tmp").exists()
