"""Trackers: what reaches them, resumed runs, and what fails. Nothing leaves the machine."""

import json
import logging
import os
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from shike_fast.engine import trackers
from shike_fast.engine.trackers import TRACKERS, Tracker, Tracking, are_trackers, require_trackers, tracker_names
from shike_fast.errors import ConfigError

CONFIG = {"method": "shike", "lr": 0.1, "device": None, "step_epochs": (3, 4)}
HISTORY = [
    {"epoch": epoch, "stage": 1, "train_loss": 3.0 / epoch, "top1": 10.0 * epoch, "few": None} for epoch in (1, 2, 3)
]


class Fake(Tracker):
    """Writes down what it gets; fails where a test wants it to."""

    module, package = "json", "fake"
    told: ClassVar[list] = []
    fails = ""

    def _say(self, *what):
        self.told.append(what)
        if what[0] == self.fails:
            raise OSError("no\nroute to host")

    def open(self, directory, config, known):
        print("fake is open")
        known.setdefault("id", f"id-{len(self.told)}")
        self._say("open", directory.name, known["id"], known["epoch"])

    def log(self, epoch, metrics):
        self._say("log", epoch, metrics)

    def close(self, finished):
        self._say("close", finished)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(TRACKERS, "fake", Fake)
    monkeypatch.setattr(Fake, "told", [])
    monkeypatch.setattr(Fake, "fails", "")
    return Fake


def test_names():
    assert tracker_names("none") == [] and tracker_names("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert are_trackers("none") and are_trackers("mlflow") and not are_trackers("none,mlflow")
    assert not any(map(are_trackers, ("", "mlflow,", "comet")))


def test_each_gets_every_epoch_once(fake, tmp_path, capsys):
    tracking = Tracking("fake", tmp_path, CONFIG, [])
    for row in HISTORY[:2]:
        tracking.log(row)
    tracking.close(finished=False)
    told, fake.told[:] = list(fake.told), []
    assert told == [
        ("open", tmp_path.name, "id-0", 0),
        ("log", 1, {"stage": 1, "train_loss": 3.0, "top1": 10.0}),
        ("log", 2, {"stage": 1, "train_loss": 1.5, "top1": 20.0}),
        ("close", False),
    ]
    Tracking("fake", tmp_path, CONFIG, HISTORY).close(finished=True)  # a resumed run has epoch 3 in its checkpoint
    assert fake.told == [
        ("open", tmp_path.name, "id-0", 2),
        ("log", 3, {"stage": 1, "train_loss": 1.0, "top1": 30.0}),
        ("close", True),
    ]
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "fake is open\n" * 2


def test_one_that_joins_later_gets_the_epochs_before(fake, tmp_path):
    Tracking("none", tmp_path, CONFIG, HISTORY).close(finished=False)
    assert not list(tmp_path.iterdir())
    Tracking("fake", tmp_path, CONFIG, HISTORY).close(finished=True)
    assert [what[1] for what in fake.told if what[0] == "log"] == [1, 2, 3]


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_failure_is_told_once_and_the_run_continues(fake, tmp_path, capsys, monkeypatch, where):
    class Steady(Fake):
        told: ClassVar[list] = []
        fails = ""

    monkeypatch.setitem(TRACKERS, "steady", Steady)
    fake.fails = where
    tracking = Tracking("fake,steady", tmp_path, CONFIG, [])
    for row in HISTORY:
        tracking.log(row)
    tracking.close(finished=True)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: --tracker: fake has failed (no route to host); the run continues without it"]
    assert [what[0] for what in Steady.told] == ["open", "log", "log", "log", "close"]


def test_a_full_disk_does_not_end_it(fake, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers, "atomic_write", full)
    Tracking("fake", tmp_path, CONFIG, HISTORY).close(finished=True)
    assert "fake has failed ([Errno 28] No space left on device)" in capsys.readouterr().err


def test_a_damaged_file_begins_anew(fake, tmp_path, capsys):
    (tmp_path / trackers.FILE).write_text("{")
    Tracking("fake", tmp_path, CONFIG, []).close(finished=True)
    assert fake.told[0] == ("open", tmp_path.name, "id-0", 0)
    assert "trackers.json: cannot be read (" in capsys.readouterr().err


def test_a_library_that_is_not_there(fake, monkeypatch):
    monkeypatch.setattr(fake, "module", "no_such_library")
    with pytest.raises(ConfigError) as caught:
        require_trackers("tensorboard,fake")
    assert str(caught.value) == (
        "--tracker: fake cannot be imported (No module named 'no_such_library'); pip install fake, or leave it out"
    )


def test_the_users_variables_come_first(fake, monkeypatch):
    monkeypatch.setattr(fake, "variables", {"FAKE_MODE": "offline", "FAKE_OTHER": "off"})
    monkeypatch.setenv("FAKE_MODE", "online")
    with trackers._surroundings(fake):
        assert (os.environ["FAKE_MODE"], os.environ["FAKE_OTHER"]) == ("online", "off")
    assert os.environ["FAKE_MODE"] == "online" and "FAKE_OTHER" not in os.environ


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("comet", "must be none, or some of tensorboard, wandb, mlflow, trackio, separated by commas, got comet"),
        ("none,wandb", "must be none, or some of"),
    ],
)
def test_the_command_refuses_others(runs, tmp_path, capsys, value, message):
    assert runs.train("--tracker", value, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --tracker: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_bad_input(runs, tmp_path, capsys, fake, monkeypatch):
    monkeypatch.setattr(fake, "module", "no_such_library")
    assert runs.train(*runs.small, "--tracker", "fake", "--output-dir", tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith("error: --tracker: fake cannot be imported (")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_continues_its_trackers(runs, tmp_path, fake):
    """Also where the option changes; the files of a run without trackers are the same but for theirs."""
    run = tmp_path / "run"
    fake.fails = "log"
    assert runs.train(*runs.small, "--epochs", 2, "--tracker", "none", "--output-dir", run) == 0
    assert not fake.told and not list(run.glob("events.*")) and not (run / trackers.FILE).exists()
    fake.fails = ""
    assert runs.train("--output-dir", run, "--resume", "--tracker", "fake") == 0
    rows = runs.metrics(run)
    logged = [what for what in fake.told if what[0] == "log"]
    assert [what[1] for what in logged] == [1, 2] and fake.told[-1] == ("close", True)
    assert logged[1][2] == {name: value for name, value in rows[1].items() if name != "epoch" and value is not None}


# ---- the libraries, each where it is installed


def events(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(one.step, one.value) for one in EventAccumulator(str(directory)).Reload().Scalars(tag)]


def twice(name, directory):
    """Two epochs, and after an interruption the third."""
    for history, done in ((HISTORY[:2], False), (HISTORY, True)):
        tracking = Tracking(name, directory, CONFIG, history)
        assert name in tracking._open
        tracking.close(finished=done)


def test_tensorboard(tmp_path):
    twice("tensorboard", tmp_path)
    assert events(tmp_path, "test/top1") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert events(tmp_path, "train/loss") == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_wandb(programs, tmp_path):
    """In a separate process, for it starts another; the files name one run."""
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    for count, done in ((2, False), (3, True)):
        code = (
            "import os, json\nfrom pathlib import Path\nfrom shike_fast.engine.trackers import Tracking\n"
            f"tracking = Tracking('wandb', Path({str(tmp_path)!r}), {CONFIG}, {HISTORY[:count]})\n"
            f"assert tracking._open and 'WANDB_MODE' not in os.environ\ntracking.close({done})\n"
        )
        done = programs.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    known = json.loads((tmp_path / trackers.FILE).read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{known['id']}.wandb"))
    assert known["epoch"] == 3 and len(files) == 2 and all(file.stat().st_size > 0 for file in files)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    twice("mlflow", tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("shike_fast").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params["lr"] == "0.1" and run.data.params["step_epochs"] == "(3, 4)"
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "top1")] == [
        (1, 10.0),
        (2, 20.0),
        (3, 30.0),
    ]


def test_mlflow_without_a_database(monkeypatch):
    """mlflow-skinny needs a server."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(ConfigError, match=r"^--tracker: mlflow cannot be imported \(.*sqlalchemy.*\); pip install mlf"):
        require_trackers("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    require_trackers("mlflow")


def test_mlflow_at_a_server(tmp_path, monkeypatch):
    """What it is asked for, without one."""
    asked = []

    class Client:
        def __init__(self, tracking_uri):
            asked.append(tracking_uri)

        def __getattr__(self, name):
            answers = {"get_experiment_by_name": None, "create_run": SimpleNamespace(info=SimpleNamespace(run_id="r"))}
            return lambda *args, **options: asked.append(name) or answers.get(name)

    library = SimpleNamespace(MlflowClient=Client, entities=SimpleNamespace(Param=lambda key, value: (key, value)))
    monkeypatch.setattr(trackers.MLflow, "load", classmethod(lambda cls: library))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    twice("mlflow", tmp_path)
    begun = ["get_experiment_by_name", "create_experiment", "create_run", "log_batch"]
    assert asked == [
        *("http://server", *begun, *["log_metric"] * 6, "set_terminated"),
        *("http://server", "update_run", *["log_metric"] * 3, "set_terminated"),
    ]
    assert logging.getLogger("mlflow.store.db.utils").level == logging.WARNING


def test_trackio(programs, tmp_path):
    """In a separate process: its folder is read when it is imported."""
    if programs.run([sys.executable, "-c", "import trackio"]).returncode:
        pytest.skip("trackio cannot be imported")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    code = (
        "from pathlib import Path\nfrom shike_fast.engine.trackers import Tracking\n"
        f"for count in (2, 3):\n"
        f"    tracking = Tracking('trackio', Path({str(tmp_path)!r}), {CONFIG}, {HISTORY}[:count])\n"
        "    assert tracking._open\n    tracking.close(count == 3)\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        f"print([(row['step'], row['top1']) for row in SQLiteStorage.get_logs('shike_fast', {tmp_path.name!r})])\n"
    )
    done = programs.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "warning:" not in done.stderr, done.stderr
    assert done.stdout.startswith("[(1, 10.0), (2, 20.0), (3, 30.0)]\n"), done.stdout
