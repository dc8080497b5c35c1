"""The figures of a test, against NumPy, scikit-learn and torchmetrics on the same scores."""

import csv

import numpy as np
import pytest
import torch
import torchvision_operators  # noqa: F401  (before torchmetrics, which imports torchvision where it is installed)
from sklearn import metrics
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from shike_fast.engine.distributed import Processes
from shike_fast.engine.priors import long_tail_prior, sample, usual_priors
from shike_fast.engine.tail import Predictions, evaluate_tails, is_confusion_table, write_confusion
from shike_fast.errors import ConfigError

CPU = torch.device("cpu")
CLASSES, EXPERTS, IMAGES = 12, 3, 400
COUNTS = torch.tensor([500, 7, 90, 3, 15, 200, 40, 19, 20, 101, 100, 5])


class Scripted(nn.Module):
    """Returns the logits it is given as images: images [B, K, C] -> [K, B, C]."""

    def forward(self, images, stage):
        return images.transpose(0, 1)


def made(images=IMAGES, absent=(), seed=0):
    """Logits [N, K, C] that are right more often where there is more to learn from, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([c for c in range(CLASSES) if c not in absent])
    labels = present[torch.randint(len(present), (images,), generator=generator)]
    logits = torch.randn(images, EXPERTS, CLASSES, generator=generator)
    logits += 0.5 * COUNTS.log()
    logits[torch.arange(images), :, labels] += 2.0
    return logits, labels


def evaluated(logits, labels, scores_prior="train", priors=None, size=64):
    batches = [(logits[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)]
    priors = usual_priors(COUNTS) if priors is None else priors
    return evaluate_tails(Scripted(), batches, priors, scores_prior, stage=1, class_counts=COUNTS, device=CPU)


@pytest.fixture(scope="module")
def case():
    logits, labels = made()
    return logits, labels, evaluated(logits, labels)


def test_the_ensemble_and_every_expert(case):
    logits, labels, tail = case
    y = labels.numpy()
    predictions = [logits.mean(1).argmax(-1).numpy(), *(logits[:, k].argmax(-1).numpy() for k in range(EXPERTS))]
    for one, predicted in zip([tail.ensemble, *tail.experts], predictions, strict=True):
        assert one.predicted.tolist() == predicted.tolist()
        figures = one.figures()
        recalls = np.array([np.mean(predicted[y == c] == c) for c in range(CLASSES)])
        assert figures["top1"] == pytest.approx(100 * metrics.accuracy_score(y, predicted))
        assert figures["balanced_accuracy"] == pytest.approx(100 * metrics.balanced_accuracy_score(y, predicted))
        expected = metrics.f1_score(y, predicted, average="macro", labels=range(CLASSES), zero_division=0)
        assert figures["macro_f1"] == pytest.approx(100 * expected)
        assert figures["worst_tenth"] == pytest.approx(100 * np.sort(recalls)[:2].mean())  # of 12 classes, rounded up
        assert one.worst_class == recalls.argmin()
        counts = COUNTS.numpy()
        for shot, mask in (("many", counts > 100), ("few", counts < 20)):
            assert figures[shot] == pytest.approx(100 * np.mean((predicted == y)[mask[y]]))
    assert tail.evaluation.expert_top1 == pytest.approx([expert.figures()["top1"] for expert in tail.experts])
    assert tail.evaluation.correct.tolist() == tail.ensemble.evaluation.correct.tolist()


def test_classes_without_test_images_count_nowhere():
    logits, labels = made(absent=(0, 3))
    tail = evaluated(logits, labels)
    y, predicted = labels.numpy(), tail.predicted.numpy()
    present = [c for c in range(CLASSES) if c not in (0, 3)]
    recalls = [np.mean(predicted[y == c] == c) for c in present]
    assert tail.ensemble.balanced_accuracy == pytest.approx(100 * np.mean(recalls))
    expected = metrics.f1_score(y, predicted, average="macro", labels=present, zero_division=0)
    assert tail.ensemble.macro_f1 == pytest.approx(100 * expected)
    assert tail.ensemble.worst_class == present[int(np.argmin(recalls))]
    weights = tail.priors["forward:50"].numpy()[present]
    assert tail.under("forward:50").top1 == pytest.approx(100 * np.sum(weights * recalls) / weights.sum())
    assert tail.evaluation.class_accuracy[0] is None


def test_the_confusion_matrix(case, tmp_path):
    _, labels, tail = case
    expected = metrics.confusion_matrix(labels.numpy(), tail.predicted.numpy(), labels=range(CLASSES))
    assert tail.confusion().tolist() == expected.tolist()
    assert tail.confusion([7, 2]).tolist() == expected[[7, 2]].tolist()
    names = [f"class, {c}" for c in range(CLASSES)]
    write_confusion(tmp_path / "confusion.csv", tail, names)
    with open(tmp_path / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "name", *map(str, range(CLASSES))]
    assert [row[1] for row in rows[1:]] == names
    assert [[int(cell) for cell in row[2:]] for row in rows[1:]] == expected.tolist()
    assert is_confusion_table(tmp_path / "confusion.csv")
    (tmp_path / "per_class.csv").write_text("class,name,train_images\n")
    assert not is_confusion_table(tmp_path / "per_class.csv")


def test_calibration_and_likelihood(case):
    logits, labels, tail = case
    probabilities = logits.mean(1).softmax(-1)
    outside = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    assert tail.calibration_error == pytest.approx(float(outside(probabilities, labels)), abs=1e-6)
    p = logits.mean(1).double().softmax(-1).numpy()
    assert tail.negative_log_likelihood == pytest.approx(metrics.log_loss(labels, p, labels=range(CLASSES)), rel=1e-5)
    confidence, hits = p.max(1), p.argmax(1) == labels.numpy()
    bins = tail.reliability()
    assert len(bins) == 15 and sum(one["images"] for one in bins) == IMAGES
    for b, one in enumerate(bins):
        own = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        assert one["images"] == own.sum()
        assert (one["from"], one["to"]) == pytest.approx((b / 15, (b + 1) / 15))
        if own.any():
            assert one["confidence"] == pytest.approx(confidence[own].mean(), rel=1e-6)
            assert one["accuracy"] == pytest.approx(hits[own].mean())
        else:
            assert one["confidence"] is None and one["accuracy"] is None
    gaps = [one["images"] * abs(one["confidence"] - one["accuracy"]) for one in bins if one["images"]]
    assert sum(gaps) / IMAGES == pytest.approx(tail.calibration_error, abs=1e-6)


def test_calibration_error_of_a_known_case():
    # one class is predicted with confidence p on ten images and is right on six of them: the error is |p - 0.6|
    labels = torch.tensor([0] * 6 + [1] * 4)
    logits = torch.tensor([2.0, 0.0]).expand(10, 3, 2)
    counts = torch.tensor([5, 5])
    tail = evaluate_tails(Scripted(), [(logits, labels)], {}, "train", stage=1, class_counts=counts, device=CPU)
    confidence = torch.tensor([2.0, 0.0]).softmax(-1)[0].item()
    assert tail.calibration_error == pytest.approx(abs(confidence - 0.6), abs=1e-6)
    assert tail.reliability()[int(confidence * 15)]["images"] == 10
    assert tail.summary(["a", "b"])["test_priors"] == []


def test_certainty_lies_in_the_last_bin():
    logits = torch.tensor([200.0, 0.0]).expand(4, 1, 2)
    counts = torch.tensor([5, 5])
    batches = [(logits, torch.tensor([0, 0, 0, 1]))]
    tail = evaluate_tails(Scripted(), batches, {}, "train", stage=1, class_counts=counts, device=CPU)
    assert tail.reliability()[-1] == {"from": 14 / 15, "to": 1.0, "images": 4, "confidence": 1.0, "accuracy": 0.75}
    assert tail.calibration_error == pytest.approx(0.25)


@pytest.mark.parametrize("scores_prior", ["train", "uniform"])
@pytest.mark.parametrize("name", ["forward:50", "uniform", "backward:5"])
def test_accuracy_under_a_prior(scores_prior, name):
    logits, labels = made(seed=3)
    tail = evaluated(logits, labels, scores_prior)
    prior, y = usual_priors(COUNTS)[name].numpy(), labels.numpy()
    scores = logits.mean(1).double().numpy()
    log_train = np.log(COUNTS.numpy() / COUNTS.sum().item()) if scores_prior == "train" else 0
    corrected = (scores - log_train + np.log(prior)).argmax(1)

    def expected(predicted):
        return 100 * sum(prior[c] * np.mean(predicted[y == c] == c) for c in range(CLASSES)) / prior.sum()

    row = tail.under(name)
    assert row.top1 == pytest.approx(expected(scores.argmax(1)))
    assert row.corrected == pytest.approx(expected(corrected))
    assert row.expert_top1 == pytest.approx([expected(logits[:, k].argmax(-1).numpy()) for k in range(EXPERTS)])
    assert (row.prior, row.images) == (name, IMAGES)


def test_under_the_uniform_prior_it_is_the_balanced_accuracy(case):
    tail = case[2]
    assert tail.under("uniform").top1 == pytest.approx(tail.ensemble.balanced_accuracy)


def test_correcting_uniform_scores_for_a_uniform_test_changes_nothing(case):
    logits, labels, _ = case
    row = evaluated(logits, labels, "uniform").under("uniform")
    assert row.corrected == row.top1


def test_the_correction_helps_scores_that_follow_the_training_prior(case):
    row = case[2].under("backward:50")
    assert row.corrected > row.top1 + 5


def test_the_sampled_protocol(case):
    _, labels, tail = case
    kept = sample(labels, long_tail_prior(COUNTS, 10)).numpy()
    hits = (tail.predicted == labels).numpy()
    row = tail.under("forward:10", sampled=True)
    assert row.top1 == pytest.approx(100 * hits[kept].mean())
    assert row.images == kept.sum() < IMAGES
    assert row.corrected == pytest.approx(100 * tail.corrected[:, 2].numpy()[kept].mean())


def test_the_expectation_is_what_samples_scatter_around(case):
    _, labels, tail = case
    prior = tail.priors["backward:10"].numpy()
    rng = np.random.default_rng(0)
    y, hits = labels.numpy(), (tail.predicted == labels).numpy()
    own = [hits[y == c] for c in range(CLASSES)]
    drawn = [rng.choice(own[c]) for c in rng.choice(CLASSES, 20_000, p=prior / prior.sum())]
    assert tail.under("backward:10").top1 == pytest.approx(100 * np.mean(drawn), abs=1.5)


def test_a_prior_that_leaves_no_image():
    logits, labels = made(absent=(0,))
    only = torch.zeros(CLASSES, dtype=torch.float64)
    only[0] = 1
    tail = evaluated(logits, labels, priors={"mine": only})
    for sampled in (False, True):
        with pytest.raises(ConfigError, match="--test-prior: mine leaves no test image"):
            tail.under("mine", sampled=sampled)


def test_the_summary_is_plain_and_whole(case):
    import json

    tail = case[2]
    names = [f"name {c}" for c in range(CLASSES)]
    summary = tail.summary(names)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    worst = summary["worst_class"]
    assert worst["name"] == f"name {worst['class']}"
    assert worst["accuracy"] == min(summary["class_accuracy"])
    assert worst["train_images"] == COUNTS[worst["class"]]
    assert [row["prior"] for row in summary["test_priors"]] == list(usual_priors(COUNTS))
    assert len(summary["experts"]) == EXPERTS and summary["experts"][1]["top1"] == summary["expert_top1"][1]


def test_a_class_without_images_has_no_shot():
    one = Predictions(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([500, 300]))
    assert one.figures()["few"] is None
    assert one.figures()["worst_tenth"] == 50


def _in_two_processes():
    """A share of every batch in each of two processes; images [K, C] come with their label."""
    logits, labels = made(images=101)
    rank = torch.distributed.get_rank()
    batches = [(logits[i : i + 20][rank::2], labels[i : i + 20][rank::2]) for i in range(0, 101, 20)]
    batches = [batch for batch in batches if len(batch[1])]
    tail = evaluate_tails(
        Scripted(), batches, usual_priors(COUNTS), "train", stage=1, class_counts=COUNTS, device=CPU,
        processes=Processes(rank, 2),
    )  # fmt: skip
    return tail.summary([str(c) for c in range(CLASSES)])


def test_two_processes_see_the_whole_test_set(two_processes):
    alone = evaluated(*made(images=101)).summary([str(c) for c in range(CLASSES)])
    for summary in two_processes(_in_two_processes):
        assert summary.keys() == alone.keys()
        for name in ("top1", "macro_f1", "expert_top1", "class_accuracy", "worst_class", "test_images"):
            assert summary[name] == alone[name]
        assert summary["negative_log_likelihood"] == pytest.approx(alone["negative_log_likelihood"])
        assert [row["corrected"] for row in summary["test_priors"]] == pytest.approx(
            [row["corrected"] for row in alone["test_priors"]]
        )
