"""``--seeds N``: runs that differ in their seed alone, one after the other, and what they have in common."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shike_fast._util.files import atomic_write
from shike_fast._util.options import options_of
from shike_fast.data.shots import SHOTS
from shike_fast.engine import checkpoint, distributed, rundir
from shike_fast.engine.config import resolve, resume_config
from shike_fast.engine.console import RunConsole
from shike_fast.engine.report import PAGE
from shike_fast.engine.run import EMPTY, WHICH, require_named, saved_by_this_launch, train_one
from shike_fast.engine.settings import RunOptions, Settings
from shike_fast.errors import ConfigError

SUMMARY = "summary.json"
_MEASURES = ("top1", *SHOTS)


@dataclass(frozen=True)
class Series:
    """Runs below one directory.

    Attributes:
        directory: holds ``seed-S`` for each of them, and in the end ``summary.json``.
        seeds: in the order in which they are trained.
        finished: those of them that need nothing more.
    """

    directory: Path
    seeds: tuple[int, ...]
    finished: frozenset[int]

    def place(self, seed: int) -> Path:
        """The directory of a run."""
        return self.directory / f"seed-{seed}"


def run_seeds(given: dict[str, Any]) -> int:
    """Train a series, in all processes; returns the exit status: 0, or that of the run that ended it.

    Args:
        given: as for :func:`shike_fast.engine.run.run`, with ``seeds``, the number of runs.
    """
    try:
        with distributed.join(given.get("device")) as processes:
            series = processes.broadcast_from_main(lambda: plan_series(given))
            console = RunConsole(1, 1, quiet=not processes.is_main)
            for seed in sorted(series.finished):
                console.note(f"seed {seed} is finished: {series.place(seed)}")
            left = [seed for seed in series.seeds if seed not in series.finished]
            for seed in left:
                status = train_one(_of_one(given, series, seed), processes, more=seed != left[-1])
                if status != 0:
                    print("the same command with --resume resumes the series of seeds", file=sys.stderr)
                    return status
                _free()
            processes.broadcast_from_main(lambda: write_summary(series, console))
            return 0
    except distributed.PeerFailed as failure:
        return failure.exit_status


def plan_series(given: dict[str, Any]) -> Series:
    """Which runs there are, and which of them are finished.

    Raises:
        ConfigError: the directory is in use, or there is nothing to resume.
        CheckpointError: a finished run has other settings than those that are given.
    """
    resume: str | bool | None = given.get("resume")
    directory: Path | None = given.get("output_dir")
    first: int = given.get("seed", options_of(Settings)["seed"].default)
    seeds = tuple(range(first, first + given["seeds"]))
    require_named(directory)
    if resume not in (None, True, "auto"):
        raise ConfigError("--seeds: goes with --resume and --resume auto, not with the file of one run")
    if directory is None:
        if resume is not None:
            raise ConfigError(WHICH)
        config = resolve(_settings(given))
        return Series(rundir.default_directory(config.dataset, config.method), seeds, frozenset())
    series = Series(directory, seeds, frozenset())
    places = [series.place(seed) for seed in seeds]
    if resume is None and not any(map(saved_by_this_launch, places)):
        rundir.check_unused(directory, [place.name for place in places])
        for place in places:  # a series that was killed before its first checkpoint leaves an empty one
            rundir.check_unused(place)
    if resume is True and not any(map(checkpoint.has_checkpoint, places)):
        raise ConfigError(EMPTY.format(directory=directory))
    finished = frozenset(seed for seed in seeds if _finished(series.place(seed), _settings(given) | {"seed": seed}))
    return Series(directory, seeds, finished)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in options_of(RunOptions)}


def _of_one(given: dict[str, Any], series: Series, seed: int) -> dict[str, Any]:
    """What the run of one seed is given."""
    own = {name: value for name, value in given.items() if name != "seeds"}
    return own | {"seed": seed, "output_dir": series.place(seed), "resume": "auto"}


def _finished(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether a run has trained all epochs and written its report, which comes last.

    Raises:
        CheckpointError: if it has other settings.
    """
    if not (directory / PAGE).exists() or not checkpoint.has_checkpoint(directory):
        return False
    path = directory / rundir.CONFIG
    config = resume_config(json.loads(path.read_text(encoding="utf-8")), settings, str(path))
    return len(rundir.read_metrics(directory)) == config.epochs


def _free() -> None:
    """Give back what the run before has held, above all on a GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def write_summary(series: Series, console: RunConsole) -> None:
    """Write ``summary.json`` and print it as a table: of each measure mean, sample standard deviation and values.

    ``last`` is after the last epoch, ``best`` after the one with the highest ``top1``. A standard deviation needs two
    runs; a shot without classes has no values.
    """
    histories = [rundir.read_metrics(series.place(seed)) for seed in series.seeds]
    rows = {
        "last": [history[-1] for history in histories],
        "best": [max(history, key=lambda row: row["top1"]) for history in histories],  # the first of equals
    }
    summary: dict[str, Any] = {"seeds": list(series.seeds)}
    summary |= {name: {measure: spread(of, measure) for measure in _MEASURES} for name, of in rows.items()}
    summary["best"]["epoch"] = [row["epoch"] for row in rows["best"]]
    atomic_write(series.directory / SUMMARY, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    lines: list[tuple[str, dict[str, Any]]] = [
        (name, {measure: _shown(summary[name][measure]) for measure in _MEASURES}) for name in rows
    ]
    for k, seed in enumerate(series.seeds):
        lines += [(f"seed {seed}, {name}", of[k]) for name, of in rows.items()]
    console.table(f"{len(series.seeds)} seeds: test accuracy (%), mean ± sample standard deviation", lines)
    console.note(f"summary: {series.directory / SUMMARY}")


def spread(rows: Sequence[dict[str, Any]], measure: str) -> dict[str, Any]:
    """``mean``, sample standard deviation ``std`` and ``values`` of a measure over runs."""
    values = [row[measure] for row in rows]
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "values": values,
    }


def _shown(of: dict[str, Any]) -> str | None:
    if of["mean"] is None:
        return None
    return f"{of['mean']:.2f}" + ("" if of["std"] is None else f" ± {of['std']:.2f}")
