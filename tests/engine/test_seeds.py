"""``--seeds``: a series of runs, stopped, resumed and summed up."""

import json
import os
import shutil
import signal
import statistics

import pytest

from shike_fast.engine import rundir, seeds
from shike_fast.engine import trainer as trainer_module
from shike_fast.engine.console import RunConsole
from shike_fast.engine.seeds import Series, plan_series, spread, write_summary
from shike_fast.errors import ConfigError

TINY = ["--model", "resnet8", "--batch-size", "64", "--epochs", "2", "--stage2-epochs", "1"]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A finished series of two seeds, which tests only read."""
    from shike_fast.train import main

    directory = tmp_path_factory.mktemp("series") / "runs"
    assert main([*TINY, "--seed", "3", "--seeds", "2", "--output-dir", str(directory)]) == 0
    return directory


def test_every_seed_is_as_if_it_ran_alone(series, runs, tmp_path):
    assert sorted(path.name for path in series.iterdir()) == ["seed-3", "seed-4", "summary.json"]
    assert runs.train(*TINY, "--seed", 4, "--output-dir", tmp_path / "alone") == 0
    runs.assert_same_weights(series / "seed-4" / "last.pt", tmp_path / "alone" / "last.pt")
    assert runs.reproducible_metrics(series / "seed-4") == runs.reproducible_metrics(tmp_path / "alone")
    assert (series / "seed-4" / "config.json").read_text() == (tmp_path / "alone" / "config.json").read_text()


def test_the_summary(series, runs):
    summary = json.loads((series / "summary.json").read_text())
    histories = [runs.metrics(series / f"seed-{seed}") for seed in (3, 4)]
    assert summary["seeds"] == [3, 4]
    for name in ("top1", "many", "medium", "few"):
        last = [history[-1][name] for history in histories]
        assert summary["last"][name] == {
            "mean": pytest.approx(statistics.mean(last)),
            "std": pytest.approx(statistics.stdev(last)),
            "values": last,
        }
    best = [max(history, key=lambda row: row["top1"]) for history in histories]
    assert summary["best"]["few"]["values"] == [row["few"] for row in best]
    assert summary["best"]["epoch"] == [row["epoch"] for row in best]


def test_the_table_of_a_series(series, capsys, tmp_path):
    shutil.copytree(series, tmp_path / "runs")
    write_summary(Series(tmp_path / "runs", (3, 4), frozenset()), RunConsole(1, 1))
    printed = capsys.readouterr().out
    of = json.loads((series / "summary.json").read_text())["last"]["top1"]
    assert f"{of['mean']:.2f} ± {of['std']:.2f}" in printed
    for label in ("last", "best", "seed 3, last", "seed 4, best", "summary.json"):
        assert label in printed


def test_spread_of_what_is_not_there():
    assert spread([{"few": None}, {"few": None}], "few") == {"mean": None, "std": None, "values": [None, None]}
    assert spread([{"few": 3.0}], "few") == {"mean": 3.0, "std": None, "values": [3.0]}


def test_a_finished_series_is_left_alone(series, runs, tmp_path, capsys, monkeypatch):
    shutil.copytree(series, tmp_path / "runs")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("seed-*/*")}
    monkeypatch.setattr(seeds, "train_one", None)  # nothing is trained
    for resume in (["--resume"], ["--resume", "auto"]):
        assert runs.train(*TINY, "--seed", 3, "--seeds", 2, "--output-dir", tmp_path / "runs", *resume) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("seed-*/*")} == before
    assert f"seed 3 is finished: {tmp_path / 'runs' / 'seed-3'}" in capsys.readouterr().out
    assert (tmp_path / "runs" / "summary.json").read_text() == (series / "summary.json").read_text()


def test_a_series_grows(series, runs, tmp_path):
    shutil.copytree(series / "seed-3", tmp_path / "runs" / "seed-3")
    assert runs.train(*TINY, "--seed", 2, "--seeds", 2, "--output-dir", tmp_path / "runs", "--resume") == 0
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert summary["seeds"] == [2, 3]
    assert summary["last"]["top1"]["values"][1] == runs.metrics(series / "seed-3")[-1]["top1"]


def test_other_settings_than_those_of_a_finished_seed(series, runs, tmp_path, capsys):
    shutil.copytree(series, tmp_path / "runs")
    arguments = [*TINY, "--seed", 3, "--seeds", 2, "--output-dir", tmp_path / "runs", "--resume"]
    assert runs.train(*arguments, "--lr", 0.5) == 2
    errors = capsys.readouterr().err
    assert "seed-3" in errors and "belongs to another run: lr is 0.1, the command line says 0.5" in errors


class SignalAfter:
    """Sends SIGTERM once the given method of the trainer has returned so often."""

    def __init__(self, monkeypatch, calls, method="_step"):
        self.left = calls
        plain = getattr(trainer_module.Trainer, method)

        def counted(trainer, *arguments):
            result = plain(trainer, *arguments)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(trainer_module.Trainer, method, counted)


@pytest.mark.parametrize("steps", [5, pytest.param(17, marks=pytest.mark.slow)])
def test_a_signal_stops_the_whole(series, runs, tmp_path, monkeypatch, capsys, steps):
    """In the first run, and in the second one; resumed, the series ends as the uninterrupted one."""
    arguments = [*TINY, "--seed", 3, "--seeds", 2, "--output-dir", tmp_path / "runs"]
    with monkeypatch.context() as patch:
        SignalAfter(patch, steps)
        assert runs.train(*arguments) == 128 + signal.SIGTERM
    assert (tmp_path / "runs" / "seed-4").exists() == (steps > 12)
    assert not (tmp_path / "runs" / "summary.json").exists()
    assert "the same command with --resume resumes the series of seeds" in capsys.readouterr().err
    assert runs.train(*arguments, "--resume") == 0
    for seed in (3, 4):
        runs.assert_same_weights(series / f"seed-{seed}" / "last.pt", tmp_path / "runs" / f"seed-{seed}" / "last.pt")
    assert (tmp_path / "runs" / "summary.json").read_text() == (series / "summary.json").read_text()


def test_a_signal_after_the_last_step_of_a_run_stops_the_next_one(runs, tmp_path, monkeypatch):
    """The first run is finished first."""
    SignalAfter(monkeypatch, 2, method="_finish_epoch")
    assert runs.train(*TINY, "--seeds", 2, "--output-dir", tmp_path / "runs") == 128 + signal.SIGTERM
    assert (tmp_path / "runs" / "seed-0" / "report.html").exists()
    assert not (tmp_path / "runs" / "seed-1").exists()


def test_a_signal_after_the_last_step_of_all_changes_nothing(series, runs, tmp_path, monkeypatch):
    SignalAfter(monkeypatch, 4, method="_finish_epoch")
    assert runs.train(*TINY, "--seed", 3, "--seeds", 2, "--output-dir", tmp_path / "runs") == 0
    assert (tmp_path / "runs" / "summary.json").read_text() == (series / "summary.json").read_text()


def test_a_run_that_fails_ends_the_series(runs, tmp_path, capsys):
    arguments = [*TINY, "--lr", 1e30, "--seeds", 2, "--output-dir", tmp_path / "runs"]
    assert runs.train(*arguments) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "seed-1").exists()


def test_bad_input_writes_nothing(runs, tmp_path, capsys):
    assert runs.train(*TINY, "--seeds", 2, "--experts", 0, "--output-dir", tmp_path / "runs") == 2
    assert runs.train(*TINY, "--seeds", 0, "--output-dir", tmp_path / "runs") == 2
    assert "--seeds: must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def planned(directory=None, resume=None, count=2, **given):
    given |= (
        {"seeds": count} | ({"output_dir": directory} if directory else {}) | ({"resume": resume} if resume else {})
    )
    return plan_series(given)


def test_what_cannot_be_begun_or_resumed(series, tmp_path):
    with pytest.raises(ConfigError, match="--seeds: goes with --resume and --resume auto, not with the file of one"):
        planned(tmp_path / "runs", resume="last.pt")
    with pytest.raises(ConfigError, match="--resume: say which run with --output-dir"):
        planned(resume=True)
    with pytest.raises(ConfigError, match="runs holds no checkpoint"):
        planned(tmp_path / "runs", resume=True)
    with pytest.raises(ConfigError, match="is not empty"):
        planned(series)
    with pytest.raises(ConfigError, match="is not empty"):
        planned(series, seed=3)


def test_what_is_planned(series, tmp_path):
    assert planned(tmp_path / "runs", seed=5, count=3) == Series(tmp_path / "runs", (5, 6, 7), frozenset())
    assert planned(tmp_path / "runs", resume="auto").seeds == (0, 1)
    assert planned(dataset="digits-lt").directory.parts[0] == "runs"
    assert planned(series, resume="auto", seed=4).finished == {4}
    (tmp_path / "killed" / "seed-0").mkdir(parents=True)
    (tmp_path / "killed" / "seed-0" / ".lock").touch()
    assert planned(tmp_path / "killed").finished == frozenset()


def test_a_run_without_its_report_is_not_finished(series, tmp_path):
    shutil.copytree(series, tmp_path / "runs")
    (tmp_path / "runs" / "seed-3" / "report.html").unlink()
    rows = rundir.read_metrics(tmp_path / "runs" / "seed-4")
    rundir.write_metrics(tmp_path / "runs" / "seed-4", rows[:1])
    assert planned(tmp_path / "runs", resume=True, seed=3).finished == frozenset()
