"""Biases, margins and weights of classes, and the hardest classes of a row."""

import math

import numpy as np
import pytest
import torch

from shike_fast import ops

COUNTS = torch.tensor([50, 3, 20, 3, 7])


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-3])
def test_bias_by_its_formula(tau, eps):
    n = COUNTS.double().numpy()
    for kind, x in (("prior", n / n.sum()), ("counts", n)):
        plain = ops.class_bias(COUNTS, tau, eps=eps, kind=kind)
        assert plain.dtype == torch.float64 and np.allclose(plain, tau * np.log(x + eps), rtol=1e-14)
        power = ops.class_bias(COUNTS, tau, eps=eps, kind=kind, power=True)
        assert np.allclose(power, np.log(x**tau + eps), rtol=1e-14, atol=1e-15)


def test_the_reversed_prior_goes_by_stable_rank():
    reverse = ops.class_bias(COUNTS, kind="reverse").exp() * COUNTS.sum()
    # ascending: classes 1, 3 (equal, the lower one first), 4, 2, 0 with 3, 3, 7, 20, 50 images
    assert reverse.round().tolist() == [3, 50, 3, 20, 7]
    assert torch.equal(reverse.round().sort().values, COUNTS.double().sort().values)


def test_a_class_without_images_is_out_of_the_softmax():
    counts = [4, 0, 1]
    assert ops.class_bias(counts, kind="counts").tolist() == [math.log(4), -math.inf, 0]
    assert ops.class_bias(counts, tau=0).tolist() == [0, 0, 0]
    assert ops.class_bias(counts, eps=1e-9)[1] == math.log(1e-9)


def test_margin_and_weight_by_their_formulas():
    n = COUNTS.double().numpy()
    root = n**-0.25
    assert np.allclose(ops.class_margin(COUNTS, 0.3), 0.3 * root / root.max(), rtol=1e-14)
    weight = 0.001 / (1 - 0.999**n)
    assert np.allclose(ops.class_weight(COUNTS, 0.999), 5 * weight / weight.sum(), rtol=1e-14)
    assert torch.allclose(ops.class_weight(COUNTS).sum(), torch.tensor(5.0, dtype=torch.float64))
    assert ops.class_weight(COUNTS, 0.0).tolist() == [1.0] * 5


@pytest.mark.parametrize("counts", [[4, 2, 9], (4, 2, 9), np.array([4, 2, 9]), torch.tensor([4.0, 2.0, 9.0])])
def test_counts_of_any_kind(counts):
    expected = torch.tensor([4, 2, 9])
    assert torch.equal(ops.class_margin(counts), ops.class_margin(expected))
    assert torch.equal(ops.class_bias(counts, 2.0), ops.class_bias(expected, 2.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.class_bias([1, 2], kind="median"), ValueError, "kind must be one of 'prior', 'counts', 'reverse'"),
        (lambda: ops.class_bias([1, 2], eps=-1), ValueError, "class_bias: eps must be at least 0, got -1"),
        (lambda: ops.class_bias([1, 2], tau=math.inf), ValueError, "class_bias: tau must be finite"),
        (lambda: ops.class_bias([-1, 2]), ValueError, "class_counts must be at least 0, class 0 has -1"),
        (lambda: ops.class_bias([1]), ValueError, r"class_counts must be \[C\] with C >= 2"),
        (lambda: ops.class_bias(torch.ones(2, 2)), ValueError, r"class_counts must be \[C\]"),
        (lambda: ops.class_bias("many"), TypeError, "class_counts must be a tensor, list or array of numbers"),
        (lambda: ops.class_bias(torch.ones(2, dtype=torch.bool)), TypeError, "floating point or integer"),
        (lambda: ops.class_margin([1, 2, 0]), ValueError, "class_margin: class_counts must be at least 1, class 2"),
        (lambda: ops.class_margin([1, 2], largest=-0.5), ValueError, "largest must be at least 0"),
        (lambda: ops.class_weight([1, 0]), ValueError, "class_weight: class_counts must be at least 1, class 1 has 0"),
        (lambda: ops.class_weight([1, 2], beta=1.0), ValueError, r"beta must lie in \[0, 1\), got 1"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def by_sorting(logits, target, count):
    """The label first, then by falling logit and rising number."""
    rows = []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (c != label, -row[c], c))
        rows.append([c in order[:count] for c in range(len(row))])
    return torch.tensor(rows)


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hardest_classes(count, dtype):
    torch.manual_seed(0)
    logits = torch.randn(40, 12).round(decimals=0).to(dtype)  # many are equal
    logits[0] = 0.0
    logits[1, :6] = -torch.inf
    logits[2, 7] = torch.inf
    target = torch.randint(12, (40,))
    target[1] = 2
    found = ops.hardest_classes(logits, target, count)
    assert found.dtype == torch.bool and torch.equal(found, by_sorting(logits, target, count))
    assert torch.equal(found, ops.hardest_classes(logits.T.contiguous().T, target, count))
    assert ops.hardest_classes(logits[:0], target[:0], count).shape == (0, 12)


def test_hardest_classes_of_a_mask_for_the_loss():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (5,))
    mask = ops.hardest_classes(logits[0], target, 3)
    assert not mask.requires_grad
    loss = ops.expert_loss(logits, target, class_mask=mask, masked="exclude", backend="reference")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, ~mask].any() and gradient[:, mask].all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: ops.hardest_classes(z[None], y, 2), TypeError, r"logits must be a tensor \[B, C\]"),
        (lambda z, y: ops.hardest_classes(z.int(), y, 2), TypeError, "logits must be float16"),
        (lambda z, y: ops.hardest_classes(z, y[:1], 2), ValueError, r"target must be int64 \[B=3\]"),
        (lambda z, y: ops.hardest_classes(z, y + 4, 2), IndexError, r"target must lie in 0..3"),
        (lambda z, y: ops.hardest_classes(z, y, 0), ValueError, "count must be a whole number from 1 to C=4, got 0"),
        (lambda z, y: ops.hardest_classes(z, y, 5), ValueError, "from 1 to C=4, got 5"),
        (lambda z, y: ops.hardest_classes(z, y, 2.0), ValueError, "from 1 to C=4, got 2.0"),
    ],
)
def test_what_hardest_classes_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4), torch.tensor([0, 3, 1]))
