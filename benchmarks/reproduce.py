"""The published accuracies, reproduced: ``python benchmarks/reproduce.py cifar100-lt --data-dir DATA --runs RUNS``.

A queue of whole training runs, one after the other: every row of :data:`ROWS` with every seed. Each is
``python -m shike_fast.train`` at the recipe of its data set, in a directory below RUNS. A finished run is skipped, one
that was stopped or killed goes on from its last checkpoint, so the same command again goes on with the queue, on this
machine or on another one that has RUNS. Ctrl-C and SIGTERM stop it at the next step.

A finished run leaves ``benchmarks/results/accuracy/RUN.json``; ``docs/results.md`` and its picture are made of these
files alone. ``--report`` writes them and says how far the queue is, without training anything.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured_on
import results_page
import torch
from results_page import Row

import shike_fast
from shike_fast._util.cli import run_command
from shike_fast.data.shots import SHOTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "accuracy", ROOT / "docs" / "results.md"
MEASURES = ("top1", *SHOTS)
SAVE_EVERY = 50  # steps


ROWS = (
    Row(
        "shike-if100",
        "cifar100-lt",
        (),
        {"top1": 56.34, "stage1": 48.10},
        "the authors' log; the paper has 56.3, 73.4 / 56.5 / 36.0 for many / medium / few",
    ),
    Row(
        "ce-if100",
        "cifar100-lt",
        ("--method", "ce"),
        {"top1": 39.1},
        "model zoo of RIDE; another subset, without AutoAugment and Cutout",
    ),
    Row("shike-if50", "cifar100-lt", ("--imbalance-factor", "50"), {"top1": 59.8}, "the paper"),
    Row("shike-if10", "cifar100-lt", ("--imbalance-factor", "10"), {}, "not published"),
)
"""In the order in which the queue takes them, seed by seed."""


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
        options = (*place, *self.row.options, *seed, *self.options)
        return ["python", "-m", "shike_fast.train", "--dataset", self.row.dataset, *options]

    def history(self) -> list[dict[str, Any]]:
        """What the run has said of its epochs so far."""
        return _json_lines(self.directory / "metrics.jsonl")

    def epochs(self) -> int:
        """Of the whole run; 0 where it has not begun."""
        path = self.directory / "config.json"
        return json.loads(path.read_text(encoding="utf-8"))["epochs"] if path.exists() else 0

    def finished(self) -> bool:
        """Whether all epochs are done and the reports, which come last, are written."""
        history = self.history()
        return bool(history) and len(history) == self.epochs() and (self.directory / "per_class.csv").exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or that of the training command that ended the queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = sorted({row.dataset for row in ROWS})
    parser.add_argument("dataset", choices=datasets, help="whose rows")
    parser.add_argument("--data-dir", default="", metavar="DATA", help="as for shike_fast.train")
    parser.add_argument("--runs", type=Path, required=True, metavar="RUNS", help="where the runs are, or will be")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 of every row (default 3)")
    parser.add_argument("--rows", metavar="NAME[,NAME…]", help=f"some of {', '.join(row.name for row in ROWS)}")
    parser.add_argument(
        "--options",
        type=shlex.split,
        default=[],
        metavar='"OPTIONS"',
        help="more options of shike_fast.train for all rows, such as those for speed; recorded with the result",
    )
    parser.add_argument("--report", action="store_true", help="train nothing; tables of what is there")
    arguments = parser.parse_args(argv)
    rows = [row for row in ROWS if row.dataset == arguments.dataset]
    if arguments.rows is not None:
        wanted = arguments.rows.split(",")
        unknown = set(wanted) - {row.name for row in rows}
        if unknown:
            parser.error(f"--rows: {', '.join(sorted(unknown))} not among {', '.join(row.name for row in rows)}")
        rows = [row for row in rows if row.name in wanted]
    if Path(shike_fast.__file__).resolve().parents[1] != ROOT:
        parser.error(f"shike_fast is imported from {shike_fast.__file__}; install this tree: pip install -e {ROOT}")
    if arguments.seeds < 1:
        parser.error(f"--seeds: must be at least 1, got {arguments.seeds}")
    runs, options = arguments.runs.absolute(), tuple(arguments.options)
    queue = [Run(row, seed, runs, options) for seed in range(arguments.seeds) for row in rows]
    status = 0 if arguments.report else train(queue, arguments.data_dir)
    for run in queue:
        if run.finished():
            record(run)
    print("\n".join(_progress(queue)))
    write_report()
    return status


def train(queue: Sequence[Run], data_dir: str) -> int:
    """Begin or go on with the runs of a queue, one after the other, until all are finished or one ends otherwise."""
    for run in queue:
        if run.finished():
            continue
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        print(f"{run.name}: {len(run.history())} of {run.epochs() or '?'} epochs done", flush=True)
        with open(run.sittings, "a", encoding="utf-8") as file:
            file.write(json.dumps(_sitting(run, "DATA" if data_dir else "")) + "\n")
        places = ("--output-dir", str(run.directory), "--resume", "auto", "--save-every", str(SAVE_EVERY))
        status = _call([sys.executable, *run.command(data_dir)[1:], *places])
        if status != 0:
            print(f"{run.name} ended with status {status}; the same command resumes it", file=sys.stderr)
            return status
    return 0


def _call(command: list[str]) -> int:
    """Run a command and pass SIGINT and SIGTERM on to it; returns its exit status as a shell reports it.

    It has a session of its own: a terminal would send it Ctrl-C a second time, and it outlives a killed queue.
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


def record(run: Run) -> Path:
    """Write the small JSON file of a finished run."""
    config = json.loads((run.directory / "config.json").read_text(encoding="utf-8"))
    history, sittings = run.history(), _json_lines(run.sittings)
    best = max(history, key=lambda row: row["top1"])  # the first of equals, as best.pt
    before = [row for row in history if row["stage"] == 1] if history[-1]["stage"] == 2 else []
    with open(run.directory / "per_class.csv", encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    result = {
        "row": run.row.name,
        **{
            name: config[name]
            for name in ("dataset", "imbalance_factor", "subset", "method", "model", "num_experts", "seed", "epochs")
        },
        "stage2_epochs": config["stage2_epochs"],
        "last": _accuracies(history[-1]),
        "best": _accuracies(best) | {"epoch": best["epoch"]},
        "stage1": _accuracies(before[-1]) if before else None,
        "hours": round(sum(row["seconds"] for row in history) / 3600, 2),
        "hardware": _joined(sittings, "hardware"),
        "commit": _joined(sittings, "commit"),
        "torch": _joined(sittings, "torch"),
        "finished": datetime.date.today().isoformat(),
        "command": _joined(sittings, "command"),
        "curve": {
            "top1": [round(row["top1"], 2) for row in history],
            "train_loss": [round(row["train_loss"], 4) for row in history],
        },
        "class_accuracy": [float(row["accuracy"]) for row in classes],
        "class_counts": [int(row["train_images"]) for row in classes],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{run.name}.json"
    if path.exists():  # recorded when it finished
        result["finished"] = json.loads(path.read_text(encoding="utf-8"))["finished"]
    path.write_text(_compact(result), encoding="utf-8")
    return path


def _accuracies(row: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if row[name] is None else round(row[name], 2) for name in MEASURES}


def _joined(sittings: Sequence[dict[str, Any]], name: str) -> str:
    """The values of all sittings, each once, in order."""
    return ", then ".join(dict.fromkeys(sitting[name] or "unknown" for sitting in sittings))


def _compact(result: dict[str, Any]) -> str:
    """JSON with a line for each field."""
    fields = (f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is being appended to: its last line may be there in part."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def _progress(queue: Sequence[Run]) -> Iterator[str]:
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


def write_report() -> None:
    """Write docs/results.md and its pictures."""
    results = load_results()
    DOCUMENT.write_text(results_page.document(ROWS, results), encoding="utf-8")
    for dataset in dict.fromkeys(row.dataset for row in ROWS):
        pair = results_page.shike_and_ce(results, dataset)
        if pair is not None:
            results_page.draw(DOCUMENT.with_name(results_page.picture_of(dataset)), *pair)


def load_results() -> list[dict[str, Any]]:
    """All recorded runs."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    sys.exit(run_command(main))
