"""Test priors, the correction of scores for them, and the sampled protocol, against NumPy."""

import numpy as np
import pytest
import torch

from shike_fast.data.sampling import SAMPLERS
from shike_fast.engine.priors import (
    RATIOS,
    correction,
    long_tail_prior,
    parse_prior,
    sample,
    scores_prior,
    training_prior,
    uniform_prior,
    usual_priors,
)
from shike_fast.errors import ConfigError
from shike_fast.methods import Stage, create_method

COUNTS = torch.tensor([20, 300, 7, 20, 90])
RANKS = np.array([2, 0, 4, 3, 1])  # of equal classes the lower index first


@pytest.mark.parametrize("ratio", RATIOS)
def test_forward_and_backward(ratio):
    forward = ratio ** (-RANKS / 4)
    backward = ratio ** (-(4 - RANKS) / 4)
    assert long_tail_prior(COUNTS, ratio).numpy() == pytest.approx(forward / forward.sum(), rel=1e-14)
    assert long_tail_prior(COUNTS, ratio, backward=True).numpy() == pytest.approx(backward / backward.sum(), rel=1e-14)


def test_the_ratio_lies_between_head_and_tail():
    prior = long_tail_prior(torch.arange(100, 0, -1), 50)
    assert float(prior[0] / prior[-1]) == pytest.approx(50)
    assert float(prior.sum()) == pytest.approx(1)
    assert (prior.diff() < 0).all()


def test_a_single_class_has_it_all():
    assert long_tail_prior(torch.tensor([7]), 50).tolist() == [1]


def test_the_protocol_goes_from_forward_over_uniform_to_backward():
    priors = usual_priors(COUNTS)
    assert list(priors) == [
        *("forward:50", "forward:25", "forward:10", "forward:5", "forward:2", "uniform"),
        *("backward:2", "backward:5", "backward:10", "backward:25", "backward:50"),
    ]
    assert priors["uniform"].tolist() == [0.2] * 5
    assert torch.equal(priors["backward:25"], parse_prior("backward:25", COUNTS))


def test_named_priors(tmp_path):
    assert parse_prior("train", COUNTS).numpy() == pytest.approx(COUNTS.numpy() / 437)
    assert torch.equal(parse_prior("uniform", COUNTS), uniform_prior(COUNTS))
    assert torch.equal(parse_prior("forward:3.5", COUNTS), long_tail_prior(COUNTS, 3.5))
    (tmp_path / "prior.csv").write_text("1, 2,3\n4 0\n")
    assert parse_prior(str(tmp_path / "prior.csv"), COUNTS).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward:0.5", "the ratio must be a number of at least 1, got 'forward:0.5'"),
        ("backward:", "the ratio must be a number of at least 1, got 'backward:'"),
        ("forward:inf", "the ratio must be a number of at least 1"),
        ("sideways:2", "must be uniform, train, forward:RATIO, backward:RATIO or a file .* no file 'sideways:2'"),
    ],
)
def test_what_is_no_prior(text, message):
    with pytest.raises(ConfigError, match=f"--test-prior: {message}"):
        parse_prior(text, COUNTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2 3", "must hold a number for each of 5 classes, got 3"),
        ("1 2 3 4 many", "must hold numbers alone"),
        ("1 2 3 4 -1", "must be finite, not negative and not all 0"),
        ("0 0 0 0 0", "must be finite, not negative and not all 0"),
        ("1 2 3 4 nan", "must be finite, not negative and not all 0"),
    ],
)
def test_files_that_hold_no_prior(tmp_path, content, message):
    (tmp_path / "prior").write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_prior(str(tmp_path / "prior"), COUNTS)


def test_the_correction_is_bayes_rule():
    """p_test(y|x) from p(x|y): the corrected scores of exact posteriors are the exact posteriors of the test."""
    rng = np.random.default_rng(0)
    likelihood = rng.random((50, 5))  # p(x|y) of 50 x
    train, test = training_prior(COUNTS).numpy(), rng.dirichlet(np.ones(5))
    expected = likelihood * test / (likelihood * test).sum(1, keepdims=True)
    roots = np.sqrt(COUNTS.numpy())
    for name, prior in (("train", train), ("uniform", np.full(5, 0.2)), ("square-root", roots / roots.sum())):
        scores = torch.from_numpy(np.log(likelihood * prior / (likelihood * prior).sum(1, keepdims=True)))
        corrected = (scores + correction(torch.from_numpy(test), COUNTS, name)).softmax(1)
        assert corrected.numpy() == pytest.approx(expected, rel=1e-12)


def test_a_class_without_probability_is_never_predicted():
    bias = correction(torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), torch.tensor([5, 1, 1]), "uniform")
    assert bias[0] == -torch.inf and bias[1:].isfinite().all()


def test_a_class_without_training_images_counts_as_one_image():
    assert training_prior(torch.tensor([3, 0])).tolist() == [0.75, 0.25]


def test_the_sample_keeps_the_first_images_of_each_class():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(5), 100))
    prior = long_tail_prior(COUNTS, 50)
    kept = sample(torch.from_numpy(labels), prior).numpy()
    for c, rank in enumerate(RANKS):
        wanted = int(100 * 50 ** (-rank / 4) + 1e-9)  # 100, 37, 14, 5, 2
        own = np.flatnonzero(labels == c)
        assert kept[own].tolist() == [True] * wanted + [False] * (100 - wanted)


def test_a_class_with_fewer_images_than_wanted_keeps_all():
    labels = torch.tensor([0, 1, 1, 1, 1, 1])
    assert sample(labels, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist() == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_sampler_changes_the_prior_of_plain_scores_alone():
    plain, shike = (create_method(name, class_counts=COUNTS, num_experts=k) for name, k in (("ce", 1), ("shike", 3)))
    [training], [experts, classifiers] = plain.stages, shike.stages
    expected = {"instance": "train", "class-aware": "uniform", "square-root": "square-root", "progressive": "uniform"}
    assert {name: scores_prior(plain, training, name) for name in SAMPLERS} == expected
    assert scores_prior(shike, experts, "class-aware") == "uniform"
    assert {scores_prior(shike, classifiers, name) for name in SAMPLERS} == {"uniform"}
    assert scores_prior(plain, Stage("classifiers", sampler="class-aware"), "instance") == "uniform"


def test_a_method_that_names_no_prior(monkeypatch):
    plain = create_method("ce", class_counts=COUNTS, num_experts=1)
    monkeypatch.setattr(type(plain), "prior_of_scores", lambda self, stage: "balanced")
    with pytest.raises(
        ValueError, match="method 'ce': prior_of_scores must return 'train' or 'uniform', got 'balanced'"
    ):
        scores_prior(plain, plain.stages[0], "instance")
