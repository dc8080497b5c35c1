"""Where the metrics of a run go besides its directory: ``--tracker tensorboard,wandb,mlflow,trackio``.

A tracker is one class here. Its library is imported when a run names it. What it gave the run as a name, and the epochs
that it has, are kept in the run's directory: a resumed run continues the same tracked run, and a tracker that joins
later gets the epochs before.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from shike_fast._util.files import atomic_write
from shike_fast.data.shots import SHOTS
from shike_fast.errors import ConfigError, warn

NO_TRACKER = "none"
FILE = "trackers.json"
_PROJECT = "shike_fast"


class Tracker(ABC):
    """One of the libraries that show metrics.

    Attributes:
        module: what is imported.
        package: what ``pip install`` calls it.
        variables: what the environment holds while the library is imported and opened, unless the user set it.
    """

    module: ClassVar[str]
    package: ClassVar[str]
    variables: ClassVar[dict[str, str]] = {}

    @classmethod
    def load(cls) -> Any:
        """The library.

        Raises:
            ImportError: it cannot be imported.
        """
        return importlib.import_module(cls.module)

    @abstractmethod
    def open(self, directory: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
        """Begin a tracked run, or continue one.

        Args:
            directory: of the run, whose name is the tracked run's.
            config: the settings.
            known: what this method put there when the tracked run began, and ``epoch``, the last one that it has.
        """

    @abstractmethod
    def log(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of an epoch."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """End the recording; the run may be resumed later if it is not finished."""


class TensorBoard(Tracker):
    """Event files in the directory of the run."""

    module, package = "torch.utils.tensorboard", "tensorboard"

    def open(self, directory: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
        self._writer = self.load().SummaryWriter(str(directory), purge_step=known["epoch"] + 1)
        if known["epoch"] == 0:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, epoch: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "stage":
                group = "train" if name.startswith("train_") else "test" if name in ("top1", *SHOTS) else "run"
                self._writer.add_scalar(f"{group}/{name.removeprefix('train_')}", value, epoch)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB(Tracker):
    """Weights & Biases, offline unless ``WANDB_MODE`` says otherwise: files in the directory of the run."""

    module, package = "wandb", "wandb"
    variables: ClassVar[dict[str, str]] = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}

    def open(self, directory: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
        wandb = self.load()
        known.setdefault("id", secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=directory.name,
            id=known["id"],
            resume="allow",
            dir=str(directory),
            config=config,
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, epoch: int, metrics: dict[str, Any]) -> None:
        self._run.log(metrics, step=epoch)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
    """MLflow, where ``MLFLOW_TRACKING_URI`` says, else in a database in the directory of the run."""

    module, package = "mlflow", "mlflow"
    variables: ClassVar[dict[str, str]] = {"MLFLOW_DISABLE_TELEMETRY": "true"}

    @classmethod
    def load(cls) -> Any:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            importlib.import_module("sqlalchemy")  # mlflow-skinny has no database
        return super().load()

    def open(self, directory: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
        mlflow = self.load()
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # which tells of each table
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(directory / 'mlflow.db').resolve()}"
        self._client = mlflow.MlflowClient(tracking_uri=address)
        if "id" in known:
            self._id = known["id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = known["id"] = self._client.create_run(place, run_name=directory.name).info.run_id
        parameters = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
        for i in range(0, len(parameters), 100):  # as many as a request may hold
            self._client.log_batch(self._id, params=parameters[i : i + 100])

    def log(self, epoch: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, float(value), step=epoch)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Trackio(Tracker):
    """Trackio, whose dashboard finds the run in the database of this machine."""

    module, package = "trackio", "trackio"

    def open(self, directory: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
        resume = "allow" if "name" in known else "never"
        name = known.setdefault("name", directory.name)
        self._run = self.load().init(project=_PROJECT, name=name, config=config, resume=resume, embed=False)

    def log(self, epoch: int, metrics: dict[str, Any]) -> None:
        self._run.log(metrics, step=epoch)

    def close(self, finished: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def tracker_names(value: str) -> list[str]:
    """The trackers that ``--tracker`` names."""
    return [] if value == NO_TRACKER else list(dict.fromkeys(name.strip() for name in value.split(",")))


def are_trackers(value: str) -> bool:
    """Whether ``--tracker`` may say so."""
    return all(name in TRACKERS for name in tracker_names(value))


def require_trackers(value: str) -> None:
    """Import the libraries of trackers.

    Raises:
        ConfigError: naming one that is not installed.
    """
    for name in tracker_names(value):
        tracker = TRACKERS[name]
        try:
            with _surroundings(tracker):
                tracker.load()
        except ImportError as error:
            raise ConfigError(
                f"--tracker: {name} cannot be imported ({error}); pip install {tracker.package}, or leave it out"
            ) from error


class Tracking:
    """The trackers of a run; one that fails is left out from then on, with a warning, and the run continues.

    Args:
        value: what ``--tracker`` says.
        directory: of the run.
        config: its settings.
        history: the metrics of its epochs so far.
    """

    def __init__(self, value: str, directory: Path, config: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
        self._file = directory / FILE
        self._open: dict[str, Tracker] = {}
        names = tracker_names(value)
        self._known: dict[str, dict[str, Any]] = _read(self._file) if names else {}
        for name in names:
            tracker, known = TRACKERS[name](), self._known.setdefault(name, {"epoch": 0})
            with self._leaving_out(name), _surroundings(TRACKERS[name]):
                tracker.open(directory, config, known)
                self._open[name] = tracker
        for row in history:
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Record the metrics of an epoch, with each tracker that does not have them yet."""
        metrics = {name: value for name, value in row.items() if name != "epoch" and value is not None}
        for name, tracker in list(self._open.items()):
            if row["epoch"] > self._known[name]["epoch"]:
                with self._leaving_out(name):
                    tracker.log(row["epoch"], metrics)
                    self._known[name]["epoch"] = row["epoch"]
                    atomic_write(self._file, (json.dumps(self._known, indent=2) + "\n").encode())

    def close(self, finished: bool) -> None:
        """End the recording."""
        for name, tracker in list(self._open.items()):
            with self._leaving_out(name), _surroundings(TRACKERS[name]):
                tracker.close(finished)
        self._open.clear()

    @contextlib.contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # anything: a run of days is worth more than its curves
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"--tracker: {name} has failed ({reason}); the run continues without it")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """What the trackers of a run left; of a damaged file nothing, and tracked runs begin anew."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn(f"{file}: cannot be read ({error}); trackers begin anew")
        return {}
    return found


@contextlib.contextmanager
def _surroundings(tracker: type[Tracker]) -> Iterator[None]:
    """The variables of a tracker that the user has not set; what it prints goes to standard error."""
    missing = {name: value for name, value in tracker.variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
