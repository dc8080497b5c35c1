"""The published accuracies, reproduced: ``python benchmarks/reproduce.py cifar100-lt --data-dir DATA --runs RUNS``.

Every row of :data:`ROWS` with every seed is a run of ``python -m shike_fast.train`` at the recipe of its method and
data set, in a directory below RUNS. A finished run is skipped, one that was stopped or killed resumes from its last
checkpoint, so the same command again resumes the queue, on this machine or on another one that has RUNS. Ctrl-C
and SIGTERM stop it at the next step. ``--rows short`` trains the short schedule, ``--rows balpoe-short`` one row.

A finished run leaves ``benchmarks/results/accuracy/RUN.json``; ``docs/results.md`` and its picture are made of these
files alone. ``--report`` writes them and says how far the queue is, without training anything.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_page
import run_queue
from run_queue import MEASURES, ROOT, Row, Run, joined

from shike_fast._util.cli import run_command

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "accuracy", ROOT / "docs" / "results.md"
SHORT = 40, 200  # epochs, of how many published ones

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
    Row(
        "balpoe-short",
        "cifar100-lt",
        ("--method", "balpoe"),
        {"top1": 51.98},
        "five seeds by a third party, ± 0.23; the paper has 52.0",
        SHORT,
    ),
    Row("shike-short", "cifar100-lt", (), {"top1": 56.34}, "the authors' log", SHORT),
    Row("ride-short", "cifar100-lt", ("--method", "ride"), {"top1": 48.6}, "its model zoo", SHORT),
    Row("sade-short", "cifar100-lt", ("--method", "sade"), {"top1": 49.8}, "its README", SHORT),
    Row("ldam-drw-short", "cifar100-lt", ("--method", "ldam-drw"), {}, "no value that could be checked", SHORT),
    Row(
        "la-short",
        "cifar100-lt",
        ("--method", "la", "--subset", "ldam"),
        {"top1": 44.06},
        "README of its code; another subset, and its length is counted in steps",
        SHORT,
    ),
    Row(
        "ce-short",
        "cifar100-lt",
        ("--method", "ce", "--subset", "ldam"),
        {"top1": 39.1},
        "model zoo of RIDE, without AutoAugment and Cutout",
        SHORT,
    ),
)
"""In the order in which the queue takes them, seed by seed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or that of the training command that ended the queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = sorted({row.dataset for row in ROWS})
    parser.add_argument("dataset", choices=datasets, help="whose rows")
    parser.add_argument(
        "--rows",
        metavar="NAME[,NAME…]",
        help=f"in this order: some of {', '.join(row.name for row in ROWS)}; full and short: all of one schedule",
    )
    run_queue.queue_options(parser, seeds=3)
    arguments = parser.parse_args(argv)
    rows = [row for row in ROWS if row.dataset == arguments.dataset]
    if arguments.rows is not None:
        rows = chosen_rows(parser, rows, arguments.rows.split(","))
    queue = run_queue.make_queue(parser, arguments, rows)
    status = 0 if arguments.report else run_queue.train(queue, arguments.data_dir)
    for run in queue:
        if run.finished():
            record(run)
    print("\n".join(run_queue.progress(queue)))
    write_report()
    return status


def chosen_rows(parser: argparse.ArgumentParser, rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows that are named, in that order and each once; ends the program with status 2 at an unknown name."""
    named = {row.name: [row] for row in rows}
    named |= {"full": [row for row in rows if row.schedule is None]}
    named |= {"short": [row for row in rows if row.schedule is not None]}
    unknown = set(wanted) - named.keys()
    if unknown:
        parser.error(f"--rows: {', '.join(sorted(unknown))} not among {', '.join(named)}")
    return list({row.name: row for name in wanted for row in named[name]}.values())


def record(run: Run) -> Path:
    """Write the small JSON file of a finished run."""
    config = run.config()
    history, sittings = run.history(), run_queue.json_lines(run.sittings)
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
        "hardware": joined(sittings, "hardware"),
        "commit": joined(sittings, "commit"),
        "torch": joined(sittings, "torch"),
        "finished": datetime.date.today().isoformat(),
        "command": joined(sittings, "command"),
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


def _compact(result: dict[str, Any]) -> str:
    """JSON with a line for each field."""
    fields = (f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def write_report() -> None:
    """Write docs/results.md and its pictures."""
    results = load_results()
    DOCUMENT.write_text(results_page.document(ROWS, results), encoding="utf-8")
    for dataset in dict.fromkeys(row.dataset for row in ROWS):
        pair = results_page.shike_and_ce(ROWS, results, dataset)
        if pair is not None:
            results_page.draw(DOCUMENT.with_name(results_page.picture_of(dataset)), *pair)


def load_results() -> list[dict[str, Any]]:
    """All recorded runs."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    sys.exit(run_command(main))
