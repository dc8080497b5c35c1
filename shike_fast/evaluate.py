"""Evaluate a checkpoint on the test set of its data set: ``python -m shike_fast.evaluate --checkpoint RUN/best.pt``.

Prints top-1, many-, medium- and few-shot accuracy, the accuracy of each expert and the expected calibration error, and
writes a CSV with one line a class.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shike_fast._util.cli import ArgumentParser, check_workers, run_command
from shike_fast._util.files import check_output_file
from shike_fast._util.plugins import add_plugin_option, parse_with_plugins
from shike_fast.engine import report
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.console import RunConsole
from shike_fast.engine.inference import load_trained
from shike_fast.engine.metrics import Evaluation, NonFiniteLogitsError, evaluate
from shike_fast.engine.setup import make_loader
from shike_fast.engine.state import load_data
from shike_fast.errors import CheckpointError, ConfigError, RunError


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.evaluate``."""
    parser = ArgumentParser(prog="python -m shike_fast.evaluate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="best.pt or last.pt of a run directory")
    add("--data-dir", metavar="DIR", help="where the data set lies, if not where it was")
    add("--stage", type=int, metavar="N", help="of the method, from 1; default the one the checkpoint was training")
    add("--batch-size", type=int, metavar="B", help="images at a time; default four times that of the run")
    add("--workers", type=int, metavar="N", help="loader processes")
    add("--threads", type=int, metavar="N", help="CPU threads; default that of the run")
    add("--device", help="cpu, cuda or cuda:N; default cuda where there is one")
    add("--amp", metavar="auto|off|bf16|fp16", help="mixed precision; default that of the run")
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="table of classes; default CHECKPOINT.per_class.csv beside the checkpoint",
    )
    add("--json", action="store_true", help="print the result as one JSON object")
    add_plugin_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: _evaluate(parse_with_plugins(make_parser, argv)))


def _evaluate(arguments: dict[str, Any]) -> int:
    path: Path = arguments["checkpoint"]
    batch_size: int | None = arguments["batch_size"]
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size: must be at least 1, got {batch_size}")
    check_workers(arguments["workers"])
    table: Path = arguments["csv"] or path.with_name(f"{path.stem}.{report.CLASS_TABLE}")
    check_output_file("--csv", table, report.is_class_table, "is no table of classes")
    settings = {name: arguments[name] for name in ("data_dir", "workers", "device", "threads", "amp")}
    trained = load_trained(path, arguments["stage"], settings)
    config = trained.config
    dataset = load_data(config)
    if list(dataset.class_names) != trained.data["class_names"]:
        raise CheckpointError(
            f"checkpoint {path} knows other classes than the {dataset.name} at hand; check --data-dir"
        )
    loader = make_loader(config, dataset, trained.device, train=False, test_batch_size=batch_size)
    try:
        result = evaluate(
            trained.network,
            loader.epoch(0),
            stage=trained.classifiers,
            class_counts=trained.data["class_counts"],
            device=trained.device,
            autocast=trained.autocast,
            scores=trained.scores,
            calibration=True,
        )
    except NonFiniteLogitsError as error:
        raise RunError(f"checkpoint {path}: {error}") from error
    finally:
        loader.close()
    report.write_class_table(table, result, dataset.class_names)
    summary = _summary(result) | {"stage": trained.stage, "epoch": trained.epoch}
    summary |= {"checkpoint": str(path), "csv": str(table)}
    if loader.broken is not None:
        summary["unreadable_images"] = len(loader.broken)
    if arguments["json"]:
        print(json.dumps(summary, allow_nan=False))
    else:
        _print(summary, config)
    return 0


def _summary(result: Evaluation) -> dict[str, Any]:
    return {
        "top1": result.top1,
        **result.shots(),
        "expert_top1": result.expert_top1,
        "expected_calibration_error": result.calibration_error,
        "test_images": int(result.support.sum()),
    }


def _print(summary: dict[str, Any], config: TrainConfig) -> None:
    console = RunConsole(1, 1)
    console.table(
        f"{config.dataset} {config.method} {config.model}: test accuracy (%)",
        [(f"stage {summary['stage']}, epoch {summary['epoch']}", summary)],
    )
    experts = ", ".join(f"{accuracy:.2f}" for accuracy in summary["expert_top1"])
    console.note(f"each expert alone (%): {experts}")
    console.note(
        f"expected calibration error: {summary['expected_calibration_error']:.4f} ({summary['test_images']:,} images)"
    )
    if summary.get("unreadable_images"):
        console.note(f"images that could not be read, and were tested as plain grey: {summary['unreadable_images']:,}")
    console.note(f"table of classes: {summary['csv']}")


if __name__ == "__main__":
    sys.exit(main())
