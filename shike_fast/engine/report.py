"""Pictures and tables that a run leaves in its directory."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shike_fast._util.files import atomic_write
from shike_fast._util.page import REPORT, is_page_of
from shike_fast._util.pictures import SHOT_COLOURS, name_numbers, save, subplots
from shike_fast.data import LongTailData
from shike_fast.data.shots import SHOTS, shot_names
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.console import RunConsole
from shike_fast.engine.metrics import Evaluation
from shike_fast.engine.page.document import document
from shike_fast.engine.tail import TailEvaluation

CURVES = "curves.png"
CLASS_ACCURACY = "accuracy_per_class.png"
CLASS_TABLE = "per_class.csv"
PAGE = "report.html"

_COLUMNS = ("class", "name", "train_images", "test_images", "correct", "accuracy", "shot")
_MOST_NAMED_CLASSES = 10
_STYLES = ("-", "--", "-.", ":")  # of the stages' lines


def write_report(
    directory: Path,
    console: RunConsole,
    config: TrainConfig,
    dataset: LongTailData,
    history: Sequence[dict[str, Any]],
    best: dict[str, Any] | None,
    last: Evaluation | None,
    tail: TailEvaluation | None,
) -> None:
    """Print the closing table of a run and write its pictures, its table of classes and its page.

    Args:
        directory: run directory.
        console: where to print.
        config: settings of the run.
        dataset: its data set.
        history: metrics of every epoch.
        best: metrics of the best epoch, if its model is there.
        last: evaluation after the last epoch.
        tail: the same model's test image by image.
    """
    if not history or last is None or tail is None:
        raise ValueError("write_report: the run has no finished epoch")
    title = f"{config.dataset} {config.method} {config.model}"
    ends = {row["stage"]: row for row in history}  # the last epoch of each stage
    rows = [(f"stage {stage}, epoch {row['epoch']}", row) for stage, row in ends.items()]
    if best is not None:
        rows.append((f"best, epoch {best['epoch']}", best))
    console.table(f"{title}: test accuracy (%)", rows)
    write_class_table(directory / CLASS_TABLE, last, dataset.class_names)
    plot_class_accuracy(directory / CLASS_ACCURACY, last, dataset.class_names, title)
    plot_curves(directory / CURVES, history, title)
    write_page(
        directory / PAGE,
        title,
        tail,
        dataset.class_names,
        what=f"The model after epoch {history[-1]['epoch']} of {config.epochs}, the last one.",
        settings=asdict(config),
        history=history,
        best=best,
    )
    console.note(f"run directory: {directory}")


def is_page(path: Path) -> bool:
    """Whether the file at ``path`` was written by :func:`write_page`."""
    return is_page_of(REPORT, path)


def write_page(path: Path, title: str, tail: TailEvaluation, class_names: Sequence[str], **contents: Any) -> None:
    """Write the HTML report, whose arguments these are (:func:`shike_fast.engine.page.document.document`)."""
    atomic_write(path, document(title, tail, class_names, **contents).encode())


def is_class_table(path: Path) -> bool:
    """Whether the file at ``path`` was written by :func:`write_class_table`."""
    with open(path, "rb") as file:
        return file.readline().strip() == ",".join(_COLUMNS).encode()


def write_class_table(path: Path, evaluation: Evaluation, class_names: Sequence[str]) -> None:
    """Write ``class, name, train_images, test_images, correct, accuracy, shot``, a line a class.

    ``accuracy`` is in percent, and empty for a class without test images.
    """
    shot_of = shot_names(evaluation.class_counts)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for label, name in enumerate(class_names):
        accuracy = evaluation.class_accuracy[label]
        writer.writerow(
            [
                label,
                name,
                int(evaluation.class_counts[label]),
                int(evaluation.support[label]),
                int(evaluation.correct[label]),
                "" if accuracy is None else f"{accuracy:.4f}",
                shot_of[label],
            ]
        )
    atomic_write(path, text.getvalue().encode("utf-8", "backslashreplace"))  # file names need not be UTF-8


def plot_class_accuracy(path: Path, evaluation: Evaluation, class_names: Sequence[str], title: str) -> None:
    """Draw the accuracy of every class against its number of training images, with the mean of each shot.

    Classes are named where they are few enough to tell their names apart.
    """
    figure, axes = subplots(1)
    shot_of = shot_names(evaluation.class_counts)
    means = evaluation.shots()
    for shot in SHOTS:
        points = [
            (int(count), accuracy)
            for count, accuracy, name in zip(evaluation.class_counts, evaluation.class_accuracy, shot_of, strict=True)
            if name == shot and accuracy is not None
        ]
        mean = means[shot]
        if not points or mean is None:
            continue
        counts, accuracies = zip(*points, strict=True)
        colour = SHOT_COLOURS[shot]
        axes[0].scatter(counts, accuracies, s=18, color=colour, label=f"{shot}-shot: {mean:.1f} %", zorder=3)
        axes[0].hlines(mean, min(counts), max(counts), color=colour, linewidth=1, alpha=0.6)
    if len(class_names) <= _MOST_NAMED_CLASSES:
        axes[0].margins(x=0.1)  # room for the last name
        for count, accuracy, name in zip(evaluation.class_counts, evaluation.class_accuracy, class_names, strict=True):
            if accuracy is not None:
                text = name.encode("utf-8", "backslashreplace").decode()
                place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
                axes[0].annotate(text, (int(count), accuracy), parse_math=False, **place)
    axes[0].set_xscale("log")
    name_numbers(axes[0].xaxis, *axes[0].get_xlim())
    axes[0].invert_xaxis()  # head classes first, as the field draws it
    axes[0].set_ylim(-4, 107)
    axes[0].set_xlabel("training images of the class")
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].set_title(f"{title}: top-1 {evaluation.top1:.2f} %")
    figure.legend(loc="outside lower center", ncols=len(SHOTS), frameon=False)
    save(figure, path)


def plot_curves(path: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the training loss and the test accuracy of every epoch; dotted lines part the stages."""
    from matplotlib.ticker import MaxNLocator

    figure, (loss_axes, accuracy_axes) = subplots(2)
    epochs = [row["epoch"] for row in history]
    stages = sorted({row["stage"] for row in history})
    for stage in stages:
        # the stages minimise different functions: one line each
        rows = [row for row in history if row["stage"] == stage]
        loss_axes.plot(
            [row["epoch"] for row in rows],
            [row["train_loss"] for row in rows],
            _STYLES[(stage - 1) % len(_STYLES)],
            marker=".",
            color="tab:gray",
            label=f"stage {stage}",
        )
    loss_axes.set_yscale("log")
    loss_axes.set_ylabel("training loss")
    loss_axes.legend()
    for name, label in (("top1", "all"), *((shot, shot) for shot in SHOTS)):
        values = [row[name] for row in history]
        if any(value is not None for value in values):
            colour = SHOT_COLOURS.get(name, "black")
            order = 3 if name == "top1" else 2  # the mean stays visible where a shot coincides with it
            accuracy_axes.plot(epochs, values, marker=".", color=colour, label=label, zorder=order)
    accuracy_axes.set_ylim(-3, 103)
    accuracy_axes.set_ylabel("test accuracy (%)")
    accuracy_axes.legend()
    begins = [min(row["epoch"] for row in history if row["stage"] == stage) for stage in stages[1:]]
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for epoch in begins:
            axes.axvline(epoch - 0.5, color="gray", linestyle=":", linewidth=1)
    figure.suptitle(title)
    save(figure, path)
