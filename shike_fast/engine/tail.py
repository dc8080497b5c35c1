"""What a test set says of a long-tailed model: every expert, every class, calibration, other test priors.

One pass keeps a few numbers of every image, not its scores: 8 · (4 + K) bytes and a byte for each prior. So 8142
classes need no other path than ten.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast._util.files import naming, replacing
from shike_fast.engine.distributed import Processes
from shike_fast.engine.metrics import Evaluation, evaluate, mean_logits
from shike_fast.engine.priors import correction, sample
from shike_fast.errors import ConfigError

CALIBRATION_BINS = 15
_ALONE = Processes()
_CONFUSION_COLUMNS = ("class", "name", "0")


@dataclass(frozen=True)
class Predictions:
    """What one predictor, an expert or the ensemble, says of a test set. Accuracies and F1 are in percent.

    Attributes:
        labels: int64 [N].
        predicted: int64 [N].
        class_counts: int64 [C], training images of each class.
    """

    labels: Tensor
    predicted: Tensor
    class_counts: Tensor

    @cached_property
    def evaluation(self) -> Evaluation:
        """Its accuracy overall, by shot and by class."""
        classes = len(self.class_counts)
        hits = self.labels[self.labels == self.predicted]
        correct, support = (torch.bincount(some, minlength=classes) for some in (hits, self.labels))
        return Evaluation(correct, support, self.class_counts, correct.sum()[None])

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy of the classes that have test images."""
        return _mean(self.known_accuracies)

    @property
    def known_accuracies(self) -> list[float]:
        """Accuracies of the classes that have test images, in the order of the classes."""
        return [accuracy for accuracy in self.evaluation.class_accuracy if accuracy is not None]

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that have test images of ``2 · correct / (test images + predictions)``."""
        predictions = torch.bincount(self.predicted, minlength=len(self.class_counts))
        correct, support = self.evaluation.correct, self.evaluation.support
        f1 = 2 * correct.double() / (support + predictions)
        return 100 * float(f1[support > 0].mean())

    @property
    def worst_class(self) -> int:
        """The class with the lowest accuracy, the first of equals."""
        accuracies = self.evaluation.class_accuracy
        return min((c for c, a in enumerate(accuracies) if a is not None), key=lambda c: accuracies[c] or 0.0)

    @property
    def worst_tenth(self) -> float:
        """Mean accuracy of the worst tenth of the classes that have test images, of one class at least."""
        known = sorted(self.known_accuracies)
        return _mean(known[: math.ceil(len(known) / 10)])

    def figures(self) -> dict[str, float | None]:
        """Its main figures by name."""
        return {
            "top1": self.evaluation.top1,
            **self.evaluation.shots(),
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "worst_tenth": self.worst_tenth,
        }


@dataclass(frozen=True)
class UnderPrior:
    """Accuracy in percent under a test prior.

    Attributes:
        prior: its name.
        top1: of the scores as they are.
        corrected: of the scores that were corrected for the prior.
        expert_top1: of each expert.
        images: that took part.
    """

    prior: str
    top1: float
    corrected: float
    expert_top1: list[float]
    images: int


@dataclass(frozen=True)
class TailEvaluation:
    """Result of one pass over a test set, image by image.

    Attributes:
        evaluation: the accuracies that every epoch has.
        labels: int64 [N].
        predicted: int64 [N], the class with the highest score.
        expert_predicted: int64 [N, K], that of each expert alone.
        confidence: float64 [N], the highest probability.
        log_likelihood: float64 [N], the logarithm of the label's probability.
        priors: test priors by name, each float64 [P].
        corrected: bool [N, P], whether the scores, corrected for a prior, say the label.
        scores_prior: the prior that the scores are for (:func:`shike_fast.engine.priors.scores_prior`).
    """

    evaluation: Evaluation
    labels: Tensor
    predicted: Tensor
    expert_predicted: Tensor
    confidence: Tensor
    log_likelihood: Tensor
    priors: Mapping[str, Tensor]
    corrected: Tensor
    scores_prior: str

    @cached_property
    def ensemble(self) -> Predictions:
        """All experts together."""
        return Predictions(self.labels, self.predicted, self.evaluation.class_counts)

    @cached_property
    def experts(self) -> list[Predictions]:
        """Each expert alone."""
        counts = self.evaluation.class_counts
        return [Predictions(self.labels, predicted, counts) for predicted in self.expert_predicted.T]

    @property
    def negative_log_likelihood(self) -> float:
        """Mean of ``−log p_y``, in nats."""
        return -float(self.log_likelihood.mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in [0, 1] over the bins of :meth:`reliability`, Σ_b n_b/N · |conf_b − acc_b|.

        Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
        """
        bins = [row for row in self.reliability() if row["images"]]
        return sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / len(self.labels)

    def reliability(self) -> list[dict[str, Any]]:
        """Bins of equal width of the confidence: ``from``, ``to``, ``images``, ``confidence``, ``accuracy``.

        The last two are means in [0, 1], None for an empty bin. A bin has its lower bound, the last one both.
        """
        bins = (self.confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        hits = (self.labels == self.predicted).double()
        images = torch.bincount(bins, minlength=CALIBRATION_BINS)
        sums = [torch.bincount(bins, values, minlength=CALIBRATION_BINS) for values in (self.confidence, hits)]
        return [
            {
                "from": b / CALIBRATION_BINS,
                "to": (b + 1) / CALIBRATION_BINS,
                "images": n,
                "confidence": float(sums[0][b]) / n if n else None,
                "accuracy": float(sums[1][b]) / n if n else None,
            }
            for b, n in enumerate(images.tolist())
        ]

    def under(self, prior: str, *, sampled: bool = False) -> UnderPrior:
        """Accuracy under one of :attr:`priors`.

        By default the expectation, without noise of sampling: ``Σ_c p_c a_c / Σ_c p_c`` over the classes with test
        images, a_c being their accuracies. With ``sampled`` the plain accuracy over the images that
        :func:`~shike_fast.engine.priors.sample` keeps, as the published protocol has it.

        Raises:
            ConfigError: the prior leaves no image.
        """
        weights = self.priors[prior]
        of_image = weights[self.labels] / self.evaluation.support[self.labels]
        if sampled:
            of_image = sample(self.labels, weights).double()
        if not of_image.sum() > 0:
            raise ConfigError(f"--test-prior: {prior} leaves no test image; give weight to classes that have some")
        hits = [self.predicted == self.labels, self.corrected[:, list(self.priors).index(prior)]]
        hits += list((self.expert_predicted == self.labels[:, None]).T)
        top1, corrected, *experts = (100 * float((of_image @ hit.double()) / of_image.sum()) for hit in hits)
        return UnderPrior(prior, top1, corrected, experts, int((of_image > 0).sum()))

    def confusion(self, rows: Iterable[int] | None = None) -> Tensor:
        """Images of a class that are taken for another: int64 [rows, C].

        Args:
            rows: the classes wanted; default all, which is C² numbers.
        """
        classes = len(self.evaluation.class_counts)
        wanted = torch.arange(classes) if rows is None else torch.tensor(list(rows), dtype=torch.int64)
        place = torch.full((classes,), -1, dtype=torch.int64)
        place[wanted] = torch.arange(len(wanted))
        own = place[self.labels] >= 0
        cells = place[self.labels[own]] * classes + self.predicted[own]
        return torch.bincount(cells, minlength=len(wanted) * classes).reshape(len(wanted), classes)

    def summary(self, names: Sequence[str], *, sampled: bool = False) -> dict[str, Any]:
        """All figures, as ``evaluate --json`` prints them.

        Args:
            names: one a class.
            sampled: as for :meth:`under`.
        """
        worst = self.ensemble.worst_class
        return {
            **self.ensemble.figures(),
            "worst_class": {
                "class": worst,
                "name": names[worst],
                "accuracy": self.evaluation.class_accuracy[worst],
                "train_images": int(self.evaluation.class_counts[worst]),
            },
            "expert_top1": self.evaluation.expert_top1,
            "experts": [expert.figures() for expert in self.experts],
            "expected_calibration_error": self.calibration_error,
            "negative_log_likelihood": self.negative_log_likelihood,
            "reliability": self.reliability(),
            "scores_prior": self.scores_prior,
            "prior_sampling": sampled,
            "test_priors": [vars(self.under(prior, sampled=sampled)) for prior in self.priors],
            "class_accuracy": self.evaluation.class_accuracy,
            "test_images": len(self.labels),
        }


def evaluate_tails(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    priors: Mapping[str, Tensor],
    scores_prior: str,
    *,
    stage: int,
    class_counts: Tensor,
    device: torch.device,
    scores: Callable[[Tensor], Tensor] = mean_logits,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    processes: Processes = _ALONE,
) -> TailEvaluation:
    """Test a network image by image.

    Args:
        network, batches, stage, class_counts, device, scores, autocast: as for
            :class:`~shike_fast.engine.metrics.Evaluator`.
        priors: test priors by name, each float64 [C].
        scores_prior: the prior that the scores are for (:func:`shike_fast.engine.priors.scores_prior`).
        processes: who tests along, each its shard of every batch; all of them get the whole result. Only of one
            process are the images in the order of the test set.
    """
    bias = [correction(prior, class_counts.cpu(), scores_prior).float().to(device) for prior in priors.values()]
    kept: list[tuple[Tensor, ...]] = []

    def keep(labels: Tensor, logits: Tensor, scores: Tensor) -> None:
        log_p = scores.log_softmax(-1)
        predicted = scores.argmax(-1)
        confidence, own = (log_p.gather(1, chosen[:, None])[:, 0].double() for chosen in (predicted, labels))
        corrected = [(scores + b).argmax(-1) == labels for b in bias]
        hits = torch.stack(corrected, 1) if corrected else labels.new_zeros(len(labels), 0, dtype=torch.bool)
        kept.append((labels, predicted, logits.argmax(-1).T, confidence.exp(), own, hits))

    evaluation = evaluate(
        network,
        batches,
        stage=stage,
        class_counts=class_counts,
        device=device,
        autocast=autocast,
        scores=scores,
        observe=keep,
        total=processes.total,
    )
    of_all = processes.gather([torch.cat(parts).cpu() for parts in zip(*kept, strict=True)])
    labels, predicted, experts, confidence, likelihood, hits = (torch.cat(parts) for parts in zip(*of_all, strict=True))
    return TailEvaluation(evaluation, labels, predicted, experts, confidence, likelihood, priors, hits, scores_prior)


def is_confusion_table(path: Path) -> bool:
    """Whether the file at ``path`` was written by :func:`write_confusion`."""
    with open(path, "rb") as file:
        return file.readline().startswith(f"{','.join(_CONFUSION_COLUMNS)}".encode())


def write_confusion(path: Path, tail: TailEvaluation, names: Sequence[str]) -> None:
    """Write the confusion matrix as CSV: for each class its number, its name, and how often it is taken for which."""
    with replacing(path) as file, naming(path):
        for label in range(-1, len(names)):
            cells = tail.confusion([label])[0].tolist() if label >= 0 else range(len(names))
            first = (label, names[label]) if label >= 0 else _CONFUSION_COLUMNS[:2]
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerow([*first, *cells])
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))  # file names need not be UTF-8


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
