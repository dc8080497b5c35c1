"""The HTML report: one whole document, which links to nothing and says what the figures say."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image

from shike_fast.engine import report
from shike_fast.engine.page import charts
from shike_fast.engine.page.document import document
from shike_fast.engine.page.svg import Axis, Chart, linear, logarithmic
from shike_fast.engine.priors import usual_priors
from shike_fast.engine.tail import TailEvaluation, evaluate_tails


class Scripted(torch.nn.Module):
    def forward(self, images, stage):
        return images.transpose(0, 1)


def tail_of(classes, images=3, experts=2, priors=True, many=500, few=5) -> TailEvaluation:
    """A test with so many images a class, the classes in no order of their training images."""
    generator = torch.Generator().manual_seed(0)
    counts = (many * (few / many) ** torch.linspace(0, 1, classes)).round().long()
    counts = counts[torch.randperm(classes, generator=generator)]
    labels = torch.arange(classes).repeat_interleave(images)
    logits = torch.randn(len(labels), experts, classes, generator=generator) + counts.log()
    logits[torch.arange(len(labels)), :, labels] += 2
    chosen = usual_priors(counts) if priors else {}
    setting = {"stage": 1, "class_counts": counts, "device": torch.device("cpu")}
    return evaluate_tails(Scripted(), [(logits, labels)], chosen, "train", **setting)


def history(epochs=4, **changes):
    return [
        {
            "epoch": e,
            "stage": 1 + (e > 3),
            "train_loss": 2 / e,
            "top1": 9.0 * e,
            "many": 50.0,
            "medium": 30.0,
            "few": None,
        }
        | changes
        for e in range(1, epochs + 1)
    ]


def page_of(tail, names, **options):
    setting = {"what": "The last one.", "settings": {"lr": 0.1, "plugins": (), "device": None}} | options
    return document("a title", tail, names, **setting)


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 21, 100, 450])
def test_it_is_one_whole_document(classes):
    tail = tail_of(classes)
    text = page_of(tail, [f"class {c}" for c in range(classes)], history=history())
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    page = Page(text)
    assert page.tags.count("svg") == 7 and page.tags.count("h1") == 1
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in text and "<script" not in text and "url(" not in text
    assert len(text.encode()) < (1_000_000 if classes <= 100 else 2_000_000)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"base64,[^\"]*", "", text))


def test_it_says_what_the_figures_say():
    tail = tail_of(10, experts=3)
    names = [f"class {c}" for c in range(10)]
    told = {"epoch": 7, "top1": 61.5}
    words = Page(page_of(tail, names, best=told, notes=["One more thing."], sampled=False)).words
    figures = tail.ensemble.figures()
    for name in ("top1", "many", "few", "balanced_accuracy", "macro_f1", "worst_tenth"):
        assert f"{figures[name]:.2f}" in words
    for k, expert in enumerate(tail.experts, start=1):
        assert f"expert {k}" in words and f"{expert.figures()['macro_f1']:.2f}" in words
    for prior in tail.priors:
        row = tail.under(prior)
        assert prior in words and f"{row.corrected:.2f}" in words
    assert f"{tail.calibration_error:.4f}" in words and f"{tail.negative_log_likelihood:.4f}" in words
    assert "One more thing." in words and "The last one." in words
    assert "Best epoch, chosen on the test set: 7 with top-1 61.50 %." in words
    assert "lr" in words and "0.1" in words and "Training" not in words


def test_one_expert_has_no_lines_of_experts():
    words = Page(page_of(tail_of(10, experts=1), list("abcdefghij"))).words
    assert "network" in words and not any("expert" in word for word in words)


def test_without_priors_there_is_no_section_of_them():
    assert "Test priors" not in Page(page_of(tail_of(10, priors=False), list("abcdefghij"))).words


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a & b", '"quoted"', "\udcff.jpg", "狗", "x" * 300])
@pytest.mark.parametrize("classes", [4, 30])
def test_any_folder_name_can_be_a_class(tmp_path, name, classes):
    tail = tail_of(classes)
    names = [f"{name}{c}" for c in range(classes)]
    report.write_page(tmp_path / "page.html", name, tail, names, what=name, settings={"x": name})
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "script" not in Page(text).tags
    assert report.is_page(tmp_path / "page.html")


def test_other_files_are_no_reports(tmp_path):
    (tmp_path / "other.html").write_text("<!DOCTYPE html>\n<html></html>\n")
    assert not report.is_page(tmp_path / "other.html")


def test_the_worst_classes_come_with_their_mistakes():
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 2, 2, 0, 2, 1])
    logits = torch.nn.functional.one_hot(predicted, 3).float()[:, None] * 9
    setting = {"stage": 1, "class_counts": torch.tensor([200, 50, 1]), "device": torch.device("cpu")}
    tail = evaluate_tails(Scripted(), [(logits, labels)], {}, "train", **setting)
    words = Page(page_of(tail, ["ant", "bee", "cow"])).words
    start = words.index("most often taken for") + 1
    assert words[start : start + 6] == ["bee", "0.00", "medium", "50", "3", "cow (2)"]
    assert words[start + 6 : start + 12] == ["cow", "50.00", "few", "1", "2", "bee (1)"]
    assert words[start + 12 : start + 18] == ["ant", "100.00", "many", "200", "2", "–"]
    assert "Never right: 1 of 3 classes." in words


def test_confusion_in_groups_is_the_mean_of_their_rows():
    tail = tail_of(10, images=7)
    order = charts.by_training_images(tail.evaluation.class_counts)
    confusion = tail.confusion().double().numpy()[np.ix_(order, order)]
    shares = confusion / confusion.sum(1, keepdims=True)
    assert charts.confusion_shares(tail, 10).numpy() == pytest.approx(shares)
    grouped = shares.reshape(5, 2, 5, 2).sum(3).mean(1)
    assert charts.confusion_shares(tail, 5).numpy() == pytest.approx(grouped)


def test_the_picture_of_the_confusion_is_as_deep_as_its_shares():
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    address = charts._picture(shares)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3]
    assert corners.tolist() == [255, 0, 128, 221]  # 255 times the square roots


def test_dots_lie_where_the_numbers_are():
    chart = Chart("name", linear(0, 10), linear(0, 100), width=612, height=280)
    chart.dots([(0, 0), (10, 100), (5, 50)], "many", ["a", "b", "c"])
    places = re.findall(r'class="dot many" d="M([\d.]+) ([\d.]+)h0"', chart.render())
    assert places == [("56.0", "234.0"), ("556.0", "34.0"), ("306.0", "134.0")]


def test_round_numbers_on_axes():
    assert [text for _, text in linear(0, 100).ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [text for _, text in linear(0.13, 0.42).ticks] == ["0.2", "0.3", "0.4"]
    assert [text for _, text in linear(3, 3).ticks] == ["3", "3.2", "3.4", "3.6", "3.8", "4"]
    assert [text for _, text in logarithmic(5, 500).ticks] == ["5", "10", "20", "50", "100", "200", "500"]
    assert [text for _, text in logarithmic(1, 100_000).ticks] == ["1", "10", "100", "1000", "10000", "100000"]
    assert [text for _, text in logarithmic(2.5, 7).ticks] == ["3", "4", "5", "6", "7"]
    assert [text for _, text in logarithmic(2.1, 2.2).ticks] == ["2", "2.2", "2.4"]
    assert logarithmic(1, 100).place(10) == pytest.approx(0.5)
    assert Axis(10, 0, []).place(10) == 0  # an axis may fall


def test_a_long_legend_takes_two_lines():
    chart = Chart("name", linear(0, 1), linear(0, 1))
    for k in range(8):
        chart.legend("many", f"a rather long text {k}")
    text = chart.render()
    above = -int(re.search(r'viewBox="0 (-?\d+)', text)[1])
    heights = [int(y) for y in re.findall(r'key many" d="M\d+ (-?\d+)', text)]
    assert above > 0 and len(set(heights)) == 1 + above / 18 and heights == sorted(heights)
    ends = [int(x) + 23 + 6.8 * 20 for x in re.findall(r'key many" d="M(\d+)', text)]
    assert max(ends) < 640


def test_curves_of_runs_without_shots_and_of_a_single_epoch():
    assert charts.curves(history(1)).count("<svg") == 2
    assert "few" not in Page(charts.curves(history())).words
    assert "stage 2" in Page(charts.curves(history())).words
    assert charts.curves(history(train_loss=0.0)).count("<svg") == 2  # no logarithm
