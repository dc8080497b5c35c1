"""Evaluate a checkpoint on the test set of its data set: ``python -m shike_fast.evaluate --checkpoint RUN/best.pt``.

Prints top-1, many-, medium- and few-shot accuracy of the ensemble and of each expert, what the worst classes have, the
calibration, and the accuracy under long-tailed test priors. Writes a CSV with one line a class and, where asked for,
the confusion matrix and a report in HTML.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shike_fast._util.cli import ArgumentParser, check_workers, run_command
from shike_fast._util.files import check_output_file
from shike_fast._util.plugins import add_plugin_option, parse_with_plugins
from shike_fast.data import LongTailData
from shike_fast.data.shots import SHOTS
from shike_fast.engine import report
from shike_fast.engine.console import RunConsole
from shike_fast.engine.foreign import ForeignData
from shike_fast.engine.inference import Trained, load_trained
from shike_fast.engine.metrics import NonFiniteLogitsError
from shike_fast.engine.priors import WHICH, parse_prior, usual_priors
from shike_fast.engine.programs import ONNX, TORCH
from shike_fast.engine.setup import make_loader
from shike_fast.engine.state import load_data
from shike_fast.engine.tail import TailEvaluation, evaluate_tails, is_confusion_table, write_confusion
from shike_fast.engine.test_time import learn_expert_weights
from shike_fast.errors import CheckpointError, ConfigError, RunError


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.evaluate``."""
    parser = ArgumentParser(prog="python -m shike_fast.evaluate", description=__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.pt or last.pt of a run directory, exported safetensors, or weights of elsewhere",
    )
    add("--data-dir", metavar="DIR", help="where the data set lies, if not where it was")
    add("--stage", type=int, metavar="N", help="of the method, from 1; default the one the checkpoint was training")
    add("--batch-size", type=int, metavar="B", help="images at a time; default four times that of the run")
    add("--workers", type=int, metavar="N", help="loader processes")
    add("--threads", type=int, metavar="N", help="CPU threads; default that of the run")
    add("--device", help="cpu, cuda or cuda:N; default cuda where there is one")
    add("--amp", metavar="auto|off|bf16|fp16", help="mixed precision; default that of the run")
    add("--test-prior", metavar="PRIOR", help=f"also the accuracy under this class prior of the test: {WHICH}")
    add(
        "--prior-sampling",
        action="store_true",
        help="for a test prior keep the first images of each class, instead of weighting the accuracies of all classes",
    )
    add(
        "--test-time-weights",
        action="store_true",
        help="also weigh the experts by what unlabelled test images say, as SADE does; with --test-prior on a sample",
    )
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="table of classes; default CHECKPOINT.per_class.csv beside the checkpoint",
    )
    add("--confusion", type=Path, metavar="FILE", help="write the confusion matrix as CSV")
    add("--report", type=Path, metavar="FILE", help="write a report with pictures, one HTML file")
    add("--json", action="store_true", help="print the result as one JSON object")
    ForeignData.add_options(parser)
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
    if path.suffix in (TORCH, ONNX):
        raise ConfigError(
            f"--checkpoint: {path} is a program, which says nothing of its experts; evaluate the checkpoint that it "
            "was made from, or exported safetensors"
        )
    table = _check_files(arguments)
    settings = {name: arguments[name] for name in ("data_dir", "workers", "device", "threads", "amp")}
    trained = load_trained(path, arguments["stage"], settings, ForeignData.of(arguments).load())
    trained.prepare_process()
    if not trained.data["name"]:
        raise ConfigError(f"--dataset: {path} does not say which images it is tested on; name the data set")
    dataset = load_data(trained.config)
    if list(dataset.class_names) != trained.data["class_names"]:
        raise CheckpointError(
            f"checkpoint {path} knows other classes than the {dataset.name} at hand; check --data-dir"
        )
    counts: Tensor = trained.data["class_counts"]
    named: str | None = arguments["test_prior"]
    priors = usual_priors(counts) | ({named: parse_prior(named, counts)} if named is not None else {})
    learned = None
    if arguments["test_time_weights"]:
        learned = learn_expert_weights(trained, dataset, None if named is None else priors[named])
    tail, unreadable = _test(trained, dataset, path, batch_size, priors)
    sampled: bool = arguments["prior_sampling"]
    summary = tail.summary(dataset.class_names, sampled=sampled)
    summary |= {"stage": trained.stage, "epoch": trained.epoch, "checkpoint": str(path), "csv": str(table)}
    if named is not None:
        summary["test_prior"] = vars(tail.under(named, sampled=sampled))
    if learned is not None:
        weighed = dataclasses.replace(trained, scores=learned.scores)
        mixed, _ = _test(weighed, dataset, path, batch_size, priors)
        summary["test_time"] = {"weights": learned.weights.tolist(), "epochs": learned.epochs}
        summary["test_time"] |= mixed.ensemble.figures()
        if named is not None:
            summary["test_time"]["test_prior"] = vars(mixed.under(named, sampled=sampled))
    if unreadable is not None:
        summary["unreadable_images"] = unreadable
    report.write_class_table(table, tail.evaluation, dataset.class_names)
    if arguments["confusion"] is not None:
        write_confusion(arguments["confusion"], tail, dataset.class_names)
        summary["confusion"] = str(arguments["confusion"])
    title = f"{trained.config.dataset} {trained.config.method} {trained.config.model}"
    if arguments["report"] is not None:
        summary["report"] = str(arguments["report"])
        report.write_page(
            arguments["report"],
            title,
            tail,
            dataset.class_names,
            what=f"Stage {trained.stage}, epoch {trained.epoch}: {path.name}.",
            settings=dataclasses.asdict(trained.config),
            history=trained.history,
            sampled=sampled,
            notes=_notes(summary),
        )
    if arguments["json"]:
        print(json.dumps(summary, allow_nan=False))
    else:
        _print(summary, title)
    return 0


def _check_files(arguments: dict[str, Any]) -> Path:
    """Refuse, before the work, files that cannot be written; returns that of the table of classes."""
    path: Path = arguments["checkpoint"]
    table: Path = arguments["csv"] or path.with_name(f"{path.stem}.{report.CLASS_TABLE}")
    check_output_file("--csv", table, report.is_class_table, "is no table of classes")
    if arguments["confusion"] is not None:
        check_output_file("--confusion", arguments["confusion"], is_confusion_table, "is no confusion matrix")
    if arguments["report"] is not None:
        check_output_file("--report", arguments["report"], report.is_page, "is no report")
    return table


def _test(
    trained: Trained, dataset: LongTailData, path: Path, batch_size: int | None, priors: dict[str, Tensor]
) -> tuple[TailEvaluation, int | None]:
    """One pass over the test set, and the number of images that could not be read where they are files."""
    loader = make_loader(trained.config, dataset, trained.device, train=False, test_batch_size=batch_size)
    try:
        tail = evaluate_tails(
            trained.network,
            loader.epoch(0),
            stage=trained.classifiers,
            class_counts=trained.data["class_counts"],
            device=trained.device,
            autocast=trained.autocast,
            scores=trained.scores,
            scores_prior=trained.scores_prior,
            priors=priors,
        )
    except NonFiniteLogitsError as error:
        raise RunError(f"checkpoint {path}: {error}") from error
    finally:
        loader.close()
    return tail, None if loader.broken is None else len(loader.broken)


def _notes(summary: dict[str, Any]) -> list[str]:
    """Sentences on what only some evaluations have."""
    notes = []
    if "test_prior" in summary:
        under = summary["test_prior"]
        notes.append(
            f"Under the test prior {under['prior']}: {under['top1']:.2f} %, corrected {under['corrected']:.2f} %."
        )
    if "test_time" in summary:
        learned = summary["test_time"]
        weights = ", ".join(f"{weight:.2f}" for weight in learned["weights"])
        under = learned.get("test_prior")
        there = "" if under is None else f", under the test prior {under['prior']} {under['top1']:.2f} %"
        notes.append(f"Test-time weights of the experts {weights}: top-1 {learned['top1']:.2f} %{there}.")
    if summary.get("unreadable_images"):
        notes.append(f"Images that could not be read, and were tested as plain grey: {summary['unreadable_images']:,}.")
    return notes


def _print(summary: dict[str, Any], title: str) -> None:
    console = RunConsole(1, 1)
    measures = {"top1": "top-1", **{shot: shot for shot in SHOTS}}
    measures |= {"balanced_accuracy": "balanced", "macro_f1": "macro-F1"}
    rows = [("network", summary)]
    if len(summary["experts"]) > 1:
        experts = [(f"expert {k}", expert) for k, expert in enumerate(summary["experts"], start=1)]
        rows = [("ensemble", summary), *experts]
    console.table(f"{title}, stage {summary['stage']}, epoch {summary['epoch']}: test accuracy (%)", rows, measures)
    worst = summary["worst_class"]
    console.note(
        f"worst class: {worst['name']}, {worst['accuracy']:.2f} % ({worst['train_images']:,} training images); "
        f"worst tenth of the classes: {summary['worst_tenth']:.2f} %"
    )
    console.note(
        f"expected calibration error: {summary['expected_calibration_error']:.4f}, negative log-likelihood: "
        f"{summary['negative_log_likelihood']:.4f} ({summary['test_images']:,} images)"
    )
    under = {"top1": "uncorrected", "corrected": "corrected"}
    console.table("accuracy under test priors (%)", [(row["prior"], row) for row in summary["test_priors"]], under)
    for line in _notes(summary):
        console.note(line)
    for name, what in (("csv", "table of classes"), ("confusion", "confusion matrix"), ("report", "report")):
        if name in summary:
            console.note(f"{what}: {summary[name]}")


if __name__ == "__main__":
    sys.exit(main())
