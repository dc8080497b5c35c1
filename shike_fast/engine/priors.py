"""Label distributions that a test set may have, and what they do to accuracy and scores.

The test-agnostic protocol of SADE (Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic
Long-Tailed Recognition", NeurIPS 2022) asks how a model fares where the head is common (forward), where all classes are
(uniform) and where the tail is (backward).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage

RATIOS = (50, 25, 10, 5, 2)
UNIFORM, TRAIN, SQUARE_ROOT = "uniform", "train", "square-root"
_DRAWN_BY = {  # what a sampler makes of the training prior; the progressive one ends with classes in equal shares
    "instance": TRAIN,
    "class-aware": UNIFORM,
    "square-root": SQUARE_ROOT,
    "progressive": UNIFORM,
}
_SIDES = ("forward", "backward")
WHICH = "uniform, train, forward:RATIO, backward:RATIO or a file with a number for each class"


def long_tail_prior(class_counts: Tensor, ratio: float, *, backward: bool = False) -> Tensor:
    """A long-tailed prior: ``p_c ∝ ratio^(−r_c / (C − 1))``, float64 [C], which sums to 1.

    Args:
        class_counts: int64 [C], training images of each class. ``r_c`` is the rank of class c by them, from 0 for the
            largest; of equal classes the lower index comes first.
        ratio: of the most probable class to the least probable one, at least 1.
        backward: the ranks are reversed, so that the class with the fewest training images is the most probable.
    """
    order = class_counts.argsort(descending=True, stable=True)
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order.cpu()] = torch.arange(len(order), dtype=torch.float64)
    last = max(1, len(order) - 1)
    weights = float(ratio) ** -((last - ranks if backward else ranks) / last)
    return weights / weights.sum()


def uniform_prior(class_counts: Tensor) -> Tensor:
    """All classes alike: float64 [C]."""
    return torch.full((len(class_counts),), 1 / len(class_counts), dtype=torch.float64)


def training_prior(class_counts: Tensor) -> Tensor:
    """The classes' shares of the training images: float64 [C]. A class without any counts as one image."""
    counts = class_counts.cpu().double().clamp(min=1)
    return counts / counts.sum()


def usual_priors(class_counts: Tensor) -> dict[str, Tensor]:
    """The priors of the protocol by name, from ``forward:50`` over ``uniform`` to ``backward:50``; each float64 [C]."""
    forward = {f"forward:{ratio}": long_tail_prior(class_counts, ratio) for ratio in RATIOS}
    backward = {f"backward:{ratio}": long_tail_prior(class_counts, ratio, backward=True) for ratio in reversed(RATIOS)}
    return forward | {UNIFORM: uniform_prior(class_counts)} | backward


def parse_prior(text: str, class_counts: Tensor) -> Tensor:
    """The prior that ``--test-prior`` names, float64 [C].

    Args:
        text: ``uniform``, ``train``, ``forward:RATIO``, ``backward:RATIO``, or a file of C numbers, in the order of the
            classes, parted by commas or white space: shares or counts.
        class_counts: int64 [C], training images of each class.

    Raises:
        ConfigError: it is none of these, or the file does not hold a prior of these classes.
    """
    if text == UNIFORM:
        return uniform_prior(class_counts)
    if text == TRAIN:
        return training_prior(class_counts)
    side, colon, ratio = text.partition(":")
    if colon and side in _SIDES:
        return long_tail_prior(class_counts, _ratio(text, ratio), backward=side == "backward")
    return _read(Path(text), len(class_counts))


def _ratio(text: str, ratio: str) -> float:
    try:
        value = float(ratio)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise ConfigError(f"--test-prior: the ratio must be a number of at least 1, got '{text}'")
    return value


def _read(path: Path, classes: int) -> Tensor:
    if not path.is_file():
        raise ConfigError(f"--test-prior: must be {WHICH}; there is no file '{path}'")
    try:
        numbers = [float(word) for word in path.read_text(encoding="utf-8").replace(",", " ").split()]
    except OSError as error:
        raise ConfigError(f"--test-prior: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--test-prior: {path} must hold numbers alone ({error})") from error
    if len(numbers) != classes:
        raise ConfigError(f"--test-prior: {path} must hold a number for each of {classes} classes, got {len(numbers)}")
    if any(not math.isfinite(number) or number < 0 for number in numbers) or sum(numbers) <= 0:
        raise ConfigError(f"--test-prior: the numbers in {path} must be finite, not negative and not all 0")
    prior = torch.tensor(numbers, dtype=torch.float64)
    return prior / prior.sum()


def scores_prior(method: Method, stage: Stage, sampler: str) -> str:
    """The prior that the scores of a stage are for: ``train``, ``uniform`` or ``square-root``, p_c ∝ √n_c.

    Args:
        method: says whether it learns the training prior or balances the classes.
        stage: one of its stages.
        sampler: that of the run, where the stage has none.

    Raises:
        ValueError: if the method says neither.
    """
    says = method.prior_of_scores(stage)
    if says not in (TRAIN, UNIFORM):
        raise ValueError(f"method '{method.name}': prior_of_scores must return 'train' or 'uniform', got {says!r}")
    return _DRAWN_BY[stage.sampler or sampler] if says == TRAIN else UNIFORM


def correction(prior: Tensor, class_counts: Tensor, scores_prior: str) -> Tensor:
    """What scores get added for a known test prior: ``log p_test − log p_scores``, float64 [C].

    By Bayes' rule ``p_test(y|x) ∝ p(y|x) · p_test(y) / p_scores(y)`` where the images of a class stay as they were.

    Args:
        prior: [C], of the test images; −inf results where it is 0, and the class is never predicted.
        class_counts: int64 [C], training images of each class.
        scores_prior: the prior that the scores are for, as :func:`scores_prior` names it.
    """
    power = {UNIFORM: 0.0, SQUARE_ROOT: 0.5, TRAIN: 1.0}[scores_prior]
    learned = training_prior(class_counts) ** power
    return prior.log() - (learned / learned.sum()).log()


def sample(labels: Tensor, prior: Tensor) -> Tensor:
    """The published protocol's test set: bool [N], which images are kept.

    Of class c the first ``int(m · p_c / max p)`` images stay, m being the mean number of images of a class.

    Args:
        labels: int64 [N], in the order of the test set.
        prior: [C].
    """
    classes = len(prior)
    wanted = (len(labels) / classes * prior / prior.max() + 1e-9).long()  # 1e-9: 2.0 must not become 1.999…
    order = labels.argsort(stable=True)
    support = torch.bincount(labels, minlength=classes)
    begins = support.cumsum(0) - support
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels)) - begins[labels[order]]  # of an image within its class
    return places < wanted[labels]
