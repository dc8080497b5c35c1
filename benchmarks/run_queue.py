"""A queue of whole training runs, one after the other: what ``reproduce.py`` and ``compare.py`` share.

Each run is ``python -m shike_fast.train`` in a directory below RUNS. A finished one is skipped, one that was stopped or
killed resumes from its last checkpoint. Ctrl-C and SIGTERM stop the queue at the next step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measured_on
import torch

import shike_fast
from shike_fast._util.options import options_of
from shike_fast.data.shots import SHOTS
from shike_fast.engine.config import resume_config
from shike_fast.engine.settings import RunOptions
from shike_fast.train import make_parser

ROOT = Path(__file__).resolve().parents[1]
MEASURES = ("top1", *SHOTS)
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Row:
    """One line of a table: runs that differ in their seed alone.

    Attributes:
        name: in file names and on the command line.
        dataset: a name of ``--dataset``.
        options: of ``shike_fast.train``, besides data set and seed; none for its default.
        published: accuracy (%) after the last epoch, by measure; empty where none was published.
        source: where the published values stand.
        schedule: of a short run its epochs and the published ones; None for a run of full length.
    """

    name: str
    dataset: str
    options: tuple[str, ...]
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    schedule: tuple[int, int] | None = None


@dataclass(frozen=True)
class Run:
    """A row with a seed, below a directory of runs."""

    row: Row
    seed: int
    runs: Path
    options: tuple[str, ...] = ()
    """Of shike_fast.train, beside the row's."""

    @property
    def name(self) -> str:
        return f"{self.row.dataset}-{self.row.name}-seed{self.seed}"

    @property
    def directory(self) -> Path:
        return self.runs / self.row.dataset / f"{self.row.name}-seed{self.seed}"

    @property
    def sittings(self) -> Path:
        """A file beside the directory: a JSON object for every process that worked on the run."""
        return self.directory.with_suffix(".sittings.jsonl")

    def command(self, data_dir: str) -> list[str]:
        """The training command as a user would type it."""
        seed = ("--seed", str(self.seed)) if self.seed else ()
        place = ("--data-dir", data_dir) if data_dir else ()
        epochs = ("--epochs", str(self.row.schedule[0])) if self.row.schedule else ()
        options = (*place, *self.row.options, *epochs, *seed, *self.options)
        return ["python", "-m", "shike_fast.train", "--dataset", self.row.dataset, *options]

    def history(self) -> list[dict[str, Any]]:
        """What the run has said of its epochs so far."""
        return json_lines(self.directory / "metrics.jsonl")

    def config(self) -> dict[str, Any]:
        """Its settings; empty where it has not begun."""
        path = self.directory / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def epochs(self) -> int:
        """Of the whole run; 0 where it has not begun."""
        return self.config().get("epochs", 0)

    def finished(self) -> bool:
        """Whether all epochs are done and the reports, which come last, are written."""
        history = self.history()
        return bool(history) and len(history) == self.epochs() and (self.directory / "per_class.csv").exists()

    def check(self, data_dir: str) -> None:
        """Check that what is there of the run has the settings that are wanted.

        Raises:
            CheckpointError: it has others.
        """
        if self.config():
            given = vars(make_parser().parse_args(self.command(data_dir)[3:]))
            settings = {name: value for name, value in given.items() if name not in options_of(RunOptions)}
            resume_config(self.config(), settings, str(self.directory / "config.json"))


def queue_options(parser: argparse.ArgumentParser, *, seeds: int) -> None:
    """Add what every queue takes, with so many seeds by default."""
    parser.add_argument("--data-dir", default="", metavar="DATA", help="as for shike_fast.train")
    parser.add_argument("--runs", type=Path, required=True, metavar="RUNS", help="where the runs are, or will be")
    parser.add_argument(
        "--seeds", type=int, default=seeds, metavar="N", help="seeds 0 to N-1 of every row (default %(default)s)"
    )
    parser.add_argument(
        "--options",
        type=shlex.split,
        default=[],
        metavar='"OPTIONS"',
        help="more options of shike_fast.train for all rows, such as those for speed; recorded with the result",
    )
    parser.add_argument("--report", action="store_true", help="train nothing; tables of what is there")


def make_queue(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rows: Sequence[Row]) -> list[Run]:
    """The runs of the rows, seed by seed; ends the program with status 2 where something cannot be meant so."""
    if Path(shike_fast.__file__).resolve().parents[1] != ROOT:
        parser.error(f"shike_fast is imported from {shike_fast.__file__}; install this tree: pip install -e {ROOT}")
    if arguments.seeds < 1:
        parser.error(f"--seeds: must be at least 1, got {arguments.seeds}")
    runs, options = arguments.runs.absolute(), tuple(arguments.options)
    return [Run(row, seed, runs, options) for seed in range(arguments.seeds) for row in rows]


def train(queue: Sequence[Run], data_dir: str) -> int:
    """Begin or go on with the runs of a queue, one after the other, until all are finished or one ends otherwise.

    Raises:
        CheckpointError: a run that has begun has other settings.
    """
    for run in queue:
        run.check(data_dir)
    for run in queue:
        if run.finished():
            continue
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        print(f"{run.name}: {len(run.history())} of {run.epochs() or '?'} epochs done", flush=True)
        with open(run.sittings, "a", encoding="utf-8") as file:
            file.write(json.dumps(_sitting(run, "DATA" if data_dir else "")) + "\n")
        places = ("--output-dir", str(run.directory), "--resume", "auto", "--save-every", str(SAVE_EVERY))
        status = call([sys.executable, *run.command(data_dir)[1:], *places])
        if status != 0:
            print(f"{run.name} ended with status {status}; the same command resumes it", file=sys.stderr)
            return status
    return 0


def call(command: list[str]) -> int:
    """Run a command and pass SIGINT and SIGTERM on to it; returns its exit status as a shell reports it.

    It has a separate session: a terminal would send it Ctrl-C a second time, and it outlives a killed queue.
    """
    with subprocess.Popen(command, start_new_session=True) as process:
        handlers = {
            number: signal.signal(number, lambda number, _: process.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            status = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _sitting(run: Run, data_dir: str) -> dict[str, Any]:
    return {
        "command": shlex.join(run.command(data_dir)),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "epochs_before": len(run.history()),
        "commit": measured_on.commit(),
        "hardware": measured_on.hardware(),
        "torch": torch.__version__,
    }


def joined(sittings: Sequence[dict[str, Any]], name: str) -> str:
    """The values of all sittings, each once, in order."""
    return ", then ".join(dict.fromkeys(sitting[name] or "unknown" for sitting in sittings))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is being appended to: its last line may be there in part."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def progress(queue: Sequence[Run]) -> Iterator[str]:
    for run in queue:
        history, epochs = run.history(), run.epochs()
        if not history:
            yield f"{run.name}: {'no epoch done yet' if epochs else 'not begun'}"
            continue
        state = "finished" if run.finished() else f"{len(history)} of {epochs} epochs"
        left = (epochs - len(history)) * statistics.median(row["seconds"] for row in history) / 3600
        yield (
            f"{run.name}: {state}, top-1 {history[-1]['top1']:.2f} %, "
            f"{sum(row['seconds'] for row in history) / 3600:.2f} h" + (f", about {left:.1f} h left" if left else "")
        )
