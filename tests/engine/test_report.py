import csv
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast.engine import report
from shike_fast.engine.metrics import Evaluation

EVALUATION = Evaluation(
    correct=torch.tensor([9, 4, 0, 0]),
    support=torch.tensor([10, 8, 5, 0]),
    class_counts=torch.tensor([300, 50, 5, 3]),
    expert_correct=torch.tensor([13]),
)


def row(epoch, stage, **metrics):
    return {
        "epoch": epoch,
        "stage": stage,
        "train_loss": 2.0 / epoch,
        "top1": 50.0,
        "many": 90.0,
        "medium": 50.0,
    } | metrics


def test_class_table(tmp_path):
    report.write_class_table(tmp_path / "table.csv", EVALUATION, ["a", "b, c", "d", "e"])
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == ["a", "b, c", "d", "e"]
    assert [r["shot"] for r in rows] == ["many", "medium", "few", "few"]
    assert [r["accuracy"] for r in rows] == ["90.0000", "50.0000", "0.0000", ""]
    assert rows[1] == {
        "class": "1",
        "name": "b, c",
        "train_images": "50",
        "test_images": "8",
        "correct": "4",
        "accuracy": "50.0000",
        "shot": "medium",
    }


def colours(path):
    return {tuple(pixel) for pixel in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}


def test_class_picture_shows_every_shot(tmp_path):
    report.plot_class_accuracy(tmp_path / "classes.png", EVALUATION, ["a", "b", "c", "d"], "title")
    assert {(31, 119, 180), (255, 127, 14), (214, 39, 40)} <= colours(tmp_path / "classes.png")  # blue, orange, red


@pytest.mark.parametrize("name", ["$x^{$", "\udcff.jpg", "\u72d7"])
def test_any_folder_name_can_be_a_class(tmp_path, name):
    names = [name, "b", "c", "d"]
    report.plot_class_accuracy(tmp_path / "classes.png", EVALUATION, names, "title")
    report.write_class_table(tmp_path / "table.csv", EVALUATION, names)
    assert (tmp_path / "classes.png").stat().st_size > 1000
    assert report.is_class_table(tmp_path / "table.csv")


def test_class_picture_of_many_classes(tmp_path):
    many = Evaluation(torch.ones(40), torch.ones(40), torch.full((40,), 30), torch.tensor([40]))
    report.plot_class_accuracy(tmp_path / "classes.png", many, [str(c) for c in range(40)], "title")
    assert (214, 39, 40) not in colours(tmp_path / "classes.png")  # no few-shot class, no red


@pytest.mark.parametrize(
    ("most", "least"),
    [(6000, 60), (1000, 2), (500, 5), (144, 5), (60, 45), (30, 30), (19, 7), (2, 1), (2000, 1), (10**6, 1)],
)
def test_sizes_of_classes_can_be_read(tmp_path, monkeypatch, most, least):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    counts = torch.linspace(most, least, 8).long()
    evaluation = Evaluation(torch.ones(8), torch.ones(8), counts, torch.tensor([8]))
    report.plot_class_accuracy(tmp_path / "classes.png", evaluation, [str(c) for c in range(8)], "title")
    [figure] = figures
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if low <= tick.get_loc() <= high]
    labels = [tick.label1 for tick in ticks if tick.label1.get_text()]
    assert len(labels) >= 2
    assert all(float(label.get_text()) == pytest.approx(label.get_position()[0]) for label in labels)
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("stages", [(1, 1, 2), (1, 1, 1), (2, 2, 2), (1, 2, 3)])
def test_curves(tmp_path, stages):
    history = [row(epoch + 1, stage, few=None) for epoch, stage in enumerate(stages)]
    report.plot_curves(tmp_path / "curves.png", history, "title")
    found = colours(tmp_path / "curves.png")
    assert (31, 119, 180) in found
    assert (214, 39, 40) not in found  # few is None throughout: no line


def test_a_run_without_an_epoch_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="no finished epoch"):
        report.write_report(tmp_path, None, None, None, [], None, None, None)
