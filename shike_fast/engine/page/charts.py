"""The pictures of the report, each as an ``<svg>`` element."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shike_fast._util.page import shown
from shike_fast.data.shots import SHOTS, shot_names
from shike_fast.engine.page.svg import Axis, Chart, Point, linear, logarithmic
from shike_fast.engine.tail import TailEvaluation, UnderPrior

_MOST_BARS = 20  # classes that get a bar with their name, or a row with numbers
_MOST_DOTS = 400  # classes that get a dot each
_GROUPS = 100  # of classes, where there are more
_MOST_LETTERS = 14  # of a name below an axis
_BLUE = (31, 111, 180)  # of the confusion matrix
_FAINT = 0.004  # shares below are not drawn: one image of 250


def short(name: str) -> str:
    """A class name that fits below an axis."""
    name = shown(name)
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def by_training_images(class_counts: Tensor) -> list[int]:
    """The classes, the largest first; of equals the lower index first."""
    return class_counts.argsort(descending=True, stable=True).tolist()


def class_chart(tail: TailEvaluation, names: Sequence[str]) -> str:
    """The accuracy of the classes, the one with the most training images first, and the curve of these numbers.

    Few classes have a bar each. Many have a dot each, and a line of means; of more than 400, neighbours share a dot.
    """
    counts = tail.evaluation.class_counts
    order, shots = by_training_images(counts), shot_names(counts)
    accuracies = tail.evaluation.class_accuracy
    classes = len(order)
    x = linear(-0.5, classes - 0.5, "classes, by falling number of training images", count=8)
    if classes <= _MOST_BARS:
        x = Axis(-0.5, classes - 0.5, [(r, short(names[label])) for r, label in enumerate(order)], x.label)
    sizes = [max(1, int(counts[label])) for label in order]
    right = logarithmic(min(sizes), max(sizes), "training images")
    chart = Chart("Accuracy of the classes", x, linear(0, 100, "test accuracy (%)"), right=right)
    chart.area(list(enumerate(sizes)) if classes > 1 else [(-0.5, sizes[0]), (0.5, sizes[0])], "count", right=True)
    size = -(-classes // _GROUPS) if classes > _MOST_DOTS else 1
    for shot in SHOTS:
        ranks = [r for r, label in enumerate(order) if shots[label] == shot and accuracies[label] is not None]
        if not ranks:
            continue
        known = [(r, accuracies[order[r]] or 0.0) for r in ranks]
        chart.legend(shot, f"{shot} ({len(ranks)}): {statistics.mean(a for _, a in known):.1f} %")
        if classes <= _MOST_BARS:
            for rank, accuracy in known:
                chart.bar(rank - 0.36, rank + 0.36, 0, accuracy, shot, _said(tail, names, order[rank]))
        elif size == 1:
            chart.dots(known, shot, [_said(tail, names, order[r]) for r in ranks])
        else:
            chart.dots(list(_means(known, -(-len(known) // size))), shot)
    chart.line(enumerate(sizes), "count", right=True)
    if classes > _MOST_BARS:
        every = [(r, a) for r, label in enumerate(order) if (a := accuracies[label]) is not None]
        chart.line(_means(every, 10), "mean")
        chart.legend("mean", "mean of a tenth")
    return chart.render()


def _said(tail: TailEvaluation, names: Sequence[str], label: int) -> str:
    accuracy = tail.evaluation.class_accuracy[label]
    return f"{shown(names[label])}: {accuracy:.1f} %, {int(tail.evaluation.class_counts[label]):,} training images"


def _means(points: Sequence[Point], groups: int) -> Iterator[Point]:
    """Means of neighbours, in so many groups of about the same size."""
    for k in range(groups):
        xs, ys = zip(*points[k * len(points) // groups : (k + 1) * len(points) // groups], strict=True)
        yield statistics.mean(xs), statistics.mean(ys)


def reliability_chart(bins: Sequence[dict[str, Any]]) -> str:
    """Accuracy against confidence, and how many images have which."""
    images = max(1, sum(one["images"] for one in bins))
    x = linear(0, 1, "confidence, the highest probability")
    chart = Chart("Accuracy against confidence", x, linear(0, 100, "accuracy (%)"), width=420, height=300)
    histogram = Chart(
        "Images by confidence", x, linear(0, max(100 * one["images"] / images for one in bins), "images (%)", count=3),
        width=420, height=170,
    )  # fmt: skip
    for one in bins:
        if not one["images"]:
            continue
        said = f"{one['images']:,} images, confidence {100 * one['confidence']:.1f} %"
        left, right = one["from"] + 0.004, one["to"] - 0.004
        chart.bar(left, right, 0, 100 * one["accuracy"], "many", f"accuracy {100 * one['accuracy']:.1f} %, {said}")
        histogram.bar(left, right, 0, 100 * one["images"] / images, "count", said)
    chart.line([(0, 0), (1, 100)], "ideal")
    chart.legend("many", "accuracy")
    chart.legend("ideal", "calibrated")
    return f"<div>{chart.render()}{histogram.render()}</div>"


def confusion_chart(tail: TailEvaluation, names: Sequence[str]) -> str:
    """How often the images of a class, a row, are taken for which, in shares of the row.

    Of more than 100 classes, neighbours in the order of training images share a row and a column.
    """
    order = by_training_images(tail.evaluation.class_counts)
    shares = confusion_shares(tail, _GROUPS)
    size = len(shares)
    few = size <= _MOST_BARS
    places = [(r + 0.5, short(names[label])) for r, label in enumerate(order)] if few else []
    grouped = f", in {size} groups of neighbours" if size < len(order) else ""
    sorted_by = "" if few else f", from many to few training images{grouped}"
    x = Axis(0, size, places, f"predicted class{sorted_by}")
    y = Axis(size, 0, places, "true class")
    chart = Chart("Confusion of the classes", x, y, width=560, height=560 if few else 540, grid=False)
    if not few:
        chart.image(_picture(shares))
        for edge in _edges(tail, size):
            chart.line([(0, edge), (size, edge)], "edge")
            chart.line([(edge, 0), (edge, size)], "edge")
        chart.legend("edge", "between many, medium and few")
        return chart.render()
    for row, of_class in enumerate(shares.tolist()):
        for column, share in enumerate(of_class):
            if share < _FAINT:
                continue
            said = f"{shown(names[order[row]])} taken for {shown(names[order[column]])}: {100 * share:.1f} %"
            depth = min(9, int(10 * share**0.5))
            chart.bar(column, column + 1, row + 1, row, f"cell depth{depth}", said)
            kind = "light" if depth >= 7 else ""
            chart.text(column + 0.5, row + 0.5, f"{100 * share:.0f}" if share >= 0.005 else "", kind)
    return chart.render()


def confusion_shares(tail: TailEvaluation, most: int) -> Tensor:
    """Shares of the images of a class by prediction, float64 [G, G], classes by falling number of training images.

    Up to ``most`` classes G is C. Of more, G groups of neighbours: a row is the mean of its classes with test images.
    """
    order = by_training_images(tail.evaluation.class_counts)
    groups = min(most, len(order))
    group = torch.empty(len(order), dtype=torch.int64)
    group[torch.tensor(order)] = torch.arange(len(order)) * groups // len(order)
    weights = 1 / tail.evaluation.support[tail.labels].double()  # an image's share of its class
    cells = group[tail.labels] * groups + group[tail.predicted]
    sums = torch.bincount(cells, weights, minlength=groups * groups).reshape(groups, groups)
    return sums / sums.sum(1, keepdim=True).clamp(min=1)  # whose sum is the number of classes with images


def _edges(tail: TailEvaluation, groups: int) -> list[float]:
    """Where, of so many groups, one shot ends and another begins."""
    shots = shot_names(tail.evaluation.class_counts)
    classes = len(shots)
    ends = [sum(shot in SHOTS[: k + 1] for shot in shots) for k in range(len(SHOTS) - 1)]
    return [groups * end / classes for end in dict.fromkeys(ends) if 0 < end < classes]


def _picture(shares: Tensor) -> str:
    """One blue, the more opaque the larger the share, so that it suits a light and a dark page."""
    alpha = (255 * shares.clamp(0, 1).sqrt()).round().to(torch.uint8)
    pixels = torch.empty(*alpha.shape, 4, dtype=torch.uint8)
    pixels[..., :3] = torch.tensor(_BLUE, dtype=torch.uint8)
    pixels[..., 3] = alpha
    scale = max(1, 400 // len(alpha))  # programs that smooth a small picture still show its pixels
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGBA").save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def prior_chart(rows: Sequence[UnderPrior]) -> str:
    """Accuracy under the test priors: uncorrected, corrected, and of each expert."""
    values = [value for row in rows for value in (row.top1, row.corrected, *row.expert_top1)]
    x = Axis(-0.4, len(rows) - 0.6, [(k, row.prior) for k, row in enumerate(rows)], "test prior")
    low, high = min(values), max(values)
    room = max(2.0, 0.08 * (high - low))
    y = linear(max(0.0, low - room), min(100.0, high + room), "test accuracy (%)")
    chart = Chart("Accuracy under test priors", x, y)
    experts = range(len(rows[0].expert_top1))
    for k in experts if len(experts) > 1 else ():
        chart.line([(p, row.expert_top1[k]) for p, row in enumerate(rows)], f"expert{k % 4}")
        chart.legend(f"expert{k % 4}", f"expert {k + 1}")
    for kind, text, points in (
        ("mean", "uncorrected", [(float(p), row.top1) for p, row in enumerate(rows)]),
        ("many", "corrected", [(float(p), row.corrected) for p, row in enumerate(rows)]),
    ):
        chart.line(points, kind)
        chart.dots(points, kind)
        chart.legend(kind, text)
    return chart.render()


def curves(history: Sequence[dict[str, Any]]) -> str:
    """The training loss and the test accuracy of every epoch."""
    epochs = linear(min(1, history[0]["epoch"]), max(2, history[-1]["epoch"]), "epoch")
    epochs = Axis(epochs.low, epochs.high, [tick for tick in epochs.ticks if tick[0].is_integer()], epochs.label)
    losses = [row["train_loss"] for row in history if row["train_loss"] > 0] or [1.0]
    loss = Chart("Training loss", epochs, logarithmic(min(losses), max(losses), "training loss"), height=260)
    stages = sorted({row["stage"] for row in history})
    for stage in stages:
        points = [
            (row["epoch"], row["train_loss"]) for row in history if row["stage"] == stage and row["train_loss"] > 0
        ]
        loss.line(points, f"expert{(stage - 1) % 4}")
        loss.dots(points if len(points) == 1 else [], f"expert{(stage - 1) % 4}")
        loss.legend(f"expert{(stage - 1) % 4}", f"stage {stage}")
    accuracy = Chart("Test accuracy", epochs, linear(0, 100, "test accuracy (%)"), height=300)
    for name, kind in (*((shot, shot) for shot in SHOTS), ("top1", "mean")):
        points = [(row["epoch"], row[name]) for row in history if row[name] is not None]
        if points:
            accuracy.line(points, kind)
            accuracy.dots(points if len(points) == 1 else [], kind)
            accuracy.legend(kind, "all" if name == "top1" else name)
    return loss.render() + accuracy.render()
