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

import torch

from shike_fast._util.cli import ArgumentParser, check_workers, choose_device, run_command, use_device
from shike_fast._util.files import check_output_file
from shike_fast.engine import checkpoint, report
from shike_fast.engine.config import TrainConfig, replace_settings, stored_config
from shike_fast.engine.console import RunConsole
from shike_fast.engine.metrics import Evaluation, NonFiniteLogitsError, evaluate
from shike_fast.engine.precision import settle_amp
from shike_fast.engine.setup import check_device, make_loader
from shike_fast.engine.state import load_data, model_from_checkpoint
from shike_fast.engine.steps import make_autocast
from shike_fast.errors import CheckpointError, ConfigError, RunError


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.evaluate``."""
    parser = ArgumentParser(prog="python -m shike_fast.evaluate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="best.pt or last.pt of a run directory")
    add("--data-dir", metavar="DIR", help="where the data set lies, if not where it was")
    add("--stage", type=int, choices=(1, 2), help="whose classifiers to use; default those the checkpoint was training")
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(lambda: _evaluate(vars(make_parser().parse_args(argv))))


def _evaluate(arguments: dict[str, Any]) -> int:
    path: Path = arguments["checkpoint"]
    batch_size: int | None = arguments["batch_size"]
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size: must be at least 1, got {batch_size}")
    check_workers(arguments["workers"])
    table: Path = arguments["csv"] or path.with_name(f"{path.stem}.{report.CLASS_TABLE}")
    check_output_file("--csv", table, report.is_class_table, "is no table of classes")
    state = checkpoint.load_checkpoint(path)
    device = choose_device(arguments["device"])
    amp, note = settle_amp(arguments["amp"] or state["config"].get("amp"), device)
    config = _config(state, arguments | {"amp": amp}, path)
    if note is not None:
        print(note, file=sys.stderr)
    torch.set_num_threads(config.threads)
    use_device(device)
    check_device(config, device)
    model = model_from_checkpoint(state, path).to(device)
    stage = arguments["stage"] or state["stage"]
    if stage == 2 and config.method == "ce":
        raise CheckpointError(f"--stage: checkpoint {path} was trained with method 'ce', which has no stage 2")
    dataset = load_data(config)
    if list(dataset.class_names) != state["data"]["class_names"]:
        raise CheckpointError(
            f"checkpoint {path} knows other classes than the {dataset.name} at hand; check --data-dir"
        )
    loader = make_loader(config, dataset, device, train=False, test_batch_size=batch_size)
    try:
        result = evaluate(
            model,
            loader.epoch(0),
            stage=stage,
            class_counts=state["data"]["class_counts"],
            device=device,
            autocast=make_autocast(config.amp, device),
            calibration=True,
        )
    except NonFiniteLogitsError as error:
        raise RunError(f"checkpoint {path}: {error}") from error
    finally:
        loader.close()
    report.write_class_table(table, result, dataset.class_names)
    summary = _summary(result) | {"stage": stage, "epoch": state["epoch"], "checkpoint": str(path), "csv": str(table)}
    if loader.broken is not None:
        summary["unreadable_images"] = len(loader.broken)
    if arguments["json"]:
        print(json.dumps(summary, allow_nan=False))
    else:
        _print(summary, config)
    return 0


def _config(state: dict[str, Any], arguments: dict[str, Any], path: Path) -> TrainConfig:
    """Settings of the run, with those replaced that only concern the evaluation."""
    names = ("data_dir", "workers", "device", "threads", "amp")
    given = {name: arguments[name] for name in names if arguments[name] is not None}
    given |= {"loader": "auto", "cuda_graph": None}  # the run's may need a device that is not here
    return replace_settings(stored_config(state["config"], str(path)), given)


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
