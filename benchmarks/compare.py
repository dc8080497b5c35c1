"""Methods beside each other: ``python benchmarks/compare.py DATASET --methods M1 M2 … --runs RUNS``.

Every method with every seed is a run of ``python -m shike_fast.train`` in a directory below RUNS, at the recipe of the
method for the data set; ``--options`` holds for all, such as ``"--subset ldam --augmentation crop-flip"``. Finished
runs are skipped, stopped ones resume, so that the same command with more methods or seeds trains what is missing.

``comparison.md`` and ``comparison.png``, in RUNS/DATASET or in the folder of ``--output``, are made of the finished
runs, with ``--report`` without training any. ``bench_method_loss.py`` and ``bench_method_step.py`` time losses and
steps against the published way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_queue
from results_page import spread
from run_queue import MEASURES, Row, Run, joined, json_lines
from torch import nn

from shike_fast import data, methods
from shike_fast._util.cli import run_command
from shike_fast.data.shots import SHOTS
from shike_fast.engine.checkpoint import LAST, load_checkpoint
from shike_fast.engine.config import stored_config
from shike_fast.engine.state import model_from_checkpoint

TABLE, PICTURE = "comparison.md", "comparison.png"
BASELINE = "ce"
INTRODUCTION = """\
# {dataset}

Accuracies in percent after the last epoch, mean ± sample standard deviation over the seeds. **images/s** is the median
of the training epochs of the first stage, **cost** the time of a training image against `ce`, **hours** the whole run
with its tests, the mean over the seeds. Figures of time compare where the machine is the same and does nothing else.
"""


@dataclass(frozen=True)
class Entry:
    """What the finished runs of a method have in common.

    Attributes:
        method: its name.
        last: of every seed the metrics of the last epoch.
        seeds: which ones.
        epochs, experts: of a run.
        parameters: that its stages train.
        images_per_second: of training, see :data:`INTRODUCTION`.
        hours: of a run.
        origin: command, hardware, commit and PyTorch of the runs.
    """

    method: str
    last: list[dict[str, Any]]
    seeds: list[int]
    epochs: int
    experts: int
    parameters: int
    images_per_second: float
    hours: float
    origin: dict[str, str]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Entry:
        """Of one method, one run or more."""
        config = stored_config(runs[0].config(), str(runs[0].directory))
        histories = [run.history() for run in runs]
        sittings = [sitting for run in runs for sitting in json_lines(run.sittings)]
        file = runs[0].directory / LAST
        model = model_from_checkpoint(load_checkpoint(file), file, config)
        return cls(
            method=config.method,
            last=[history[-1] for history in histories],
            seeds=[run.seed for run in runs],
            epochs=config.epochs,
            experts=config.num_experts,
            parameters=trained_parameters(model, methods.find_method(config.method).stages),
            images_per_second=statistics.median(
                row["images_per_second"] for history in histories for row in history if row["stage"] == 1
            ),
            hours=statistics.mean(sum(row["seconds"] for row in history) for history in histories) / 3600,
            origin={name: joined(sittings, name) for name in ("command", "hardware", "commit", "torch")},
        )

    def values(self, measure: str) -> list[float]:
        """Of the seeds; none where a shot has no classes."""
        return [row[measure] for row in self.last if row[measure] is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or that of the training command that ended the queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(data.datasets()), help="what all methods are trained on")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods.list_methods(),
        default=methods.list_methods(),
        metavar="METHOD",
        help="in this order (default all: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, metavar="E", help="of every run (default those of each recipe)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where table and picture go (default RUNS/DATASET)"
    )
    run_queue.queue_options(parser, seeds=1)
    arguments = parser.parse_args(argv)
    epochs = () if arguments.epochs is None else ("--epochs", str(arguments.epochs))
    names = dict.fromkeys(arguments.methods)
    rows = [Row(name, arguments.dataset, ("--method", name, *epochs)) for name in names]
    queue = run_queue.make_queue(parser, arguments, rows)
    status = 0 if arguments.report else run_queue.train(queue, arguments.data_dir)
    print("\n".join(run_queue.progress(queue)))
    entries = entries_of(queue)
    if entries:
        folder = arguments.output or arguments.runs / arguments.dataset
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TABLE).write_text("\n".join(document(arguments.dataset, entries)) + "\n", encoding="utf-8")
        draw(folder / PICTURE, arguments.dataset, entries)
        print("", *table(entries), f"\n{folder / TABLE}, {PICTURE}", sep="\n")
    return status


def trained_parameters(model: nn.Module, stages: Sequence[methods.Stage]) -> int:
    """The number of parameters that any of the stages trains: no second classifiers without a second stage."""
    trained = {id(parameter): parameter.numel() for stage in stages for parameter in stage.trains(model)}
    return sum(trained.values())


def entries_of(queue: Sequence[Run]) -> list[Entry]:
    """One of each method that has finished runs, in the order of the queue."""
    runs: dict[str, list[Run]] = {}
    for run in queue:
        if run.finished():
            runs.setdefault(run.row.name, []).append(run)
    return [Entry.of(runs[name]) for name in dict.fromkeys(run.row.name for run in queue) if name in runs]


def document(dataset: str, entries: Sequence[Entry]) -> Iterator[str]:
    """The lines of the table with what it was made of."""
    yield INTRODUCTION.format(dataset=dataset)
    yield from table(entries)
    yield f"\n![Accuracy by shot]({PICTURE})\n"
    yield "| method | command | hardware | PyTorch | commit |"
    yield "|---|---|---|---|---|"
    for entry in entries:
        of = entry.origin
        yield f"| `{entry.method}` | `{of['command']}` | {of['hardware']} | {of['torch']} | {of['commit']} |"


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """A line a method."""
    columns = ("top-1", *SHOTS, "experts", "parameters", "images/s", "cost", "epochs", "hours", "seeds")
    yield f"| method | {' | '.join(columns)} |"
    yield "|" + "---|" * (len(columns) + 1)
    speed = next((entry.images_per_second for entry in entries if entry.method == BASELINE), None)
    for entry in entries:
        cells = [
            *(spread(entry.values(measure)) for measure in MEASURES),
            str(entry.experts),
            f"{entry.parameters:,}",
            f"{entry.images_per_second:,.0f}",
            "–" if speed is None else f"{speed / entry.images_per_second:.2f}",
            str(entry.epochs),
            f"{entry.hours:.2g}",
            ", ".join(map(str, entry.seeds)),
        ]
        yield f"| `{entry.method}` | {' | '.join(cells)} |"


def draw(path: Path, dataset: str, entries: Sequence[Entry]) -> None:
    """A line a method: accuracy of all images and by shot, with the standard deviation of several seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.42 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = {"top1": "all", **{shot: shot for shot in SHOTS}}
    looks = {"top1": ("D", "black"), "many": ("o", "tab:blue"), "medium": ("o", "tab:green"), "few": ("o", "tab:red")}
    for number, (measure, (marker, colour)) in enumerate(looks.items()):
        known = [(line, entry.values(measure)) for line, entry in enumerate(entries) if entry.values(measure)]
        if not known:
            continue
        axes.errorbar(
            [statistics.mean(values) for _, values in known],
            [line + 0.16 * (number - 1.5) for line, _ in known],
            xerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in known],
            linestyle="none",
            marker=marker,
            color=colour,
            capsize=3,
            label=labels[measure],
            zorder=3 if measure == "top1" else 2,
        )
    axes.set_yticks(range(len(entries)), [entry.method for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)  # the first method on top
    axes.set_xlim(left=0)
    axes.set_xlabel("test accuracy after the last epoch (%)")
    axes.grid(alpha=0.3)
    figure.suptitle(dataset)
    figure.legend(loc="outside lower center", ncols=len(looks))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(main))
