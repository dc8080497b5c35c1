"""expert_cross_entropy against torch.nn.functional.cross_entropy, expert by expert, and its closed-form gradient."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shike_fast.ops import balanced_softmax_loss, dkt_loss, expert_cross_entropy

OP = "expert_cross_entropy"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected(logits, target, bias, label_smoothing):
    """Loss and gradient in float64: dz_k = ((p_k − (1 − ε)·[c = y] − ε/C) / B)."""
    experts, batch, classes = logits.shape
    z = logits.double() + (0 if bias is None else bias.double().reshape(-1, 1, classes))
    loss = sum(F.cross_entropy(z[k], target, label_smoothing=label_smoothing) for k in range(experts))
    soft = (1 - label_smoothing) * F.one_hot(target, classes) + label_smoothing / classes
    return loss, (z.softmax(2) - soft) / batch


@settings(max_examples=90)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(2, 50)),
    dtype=st.sampled_from(DTYPES),
    bias_kind=st.sampled_from(["none", "shared", "per expert"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    sequence=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_pytorch(shape, dtype, bias_kind, label_smoothing, scale, sequence, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(shape[2], shape[1:2], generator=generator)
    bias_shape = {"none": None, "shared": shape[2:], "per expert": (shape[0], shape[2])}[bias_kind]
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=generator)
    leaf = logits.clone().requires_grad_()
    loss = expert_cross_entropy(
        leaf.unbind(0) if sequence else leaf, target, bias=bias, label_smoothing=label_smoothing
    )
    loss.backward()
    expected_loss, expected_gradient = expected(logits, target, bias, label_smoothing)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and leaf.grad.dtype == dtype
    tight = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=tight, atol=tight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    error = (leaf.grad.double() - expected_gradient).abs().max()
    assert error <= tolerance * expected_gradient.abs().max() + 1e-7


@pytest.mark.parametrize("bias_shape", [None, (5,), (19, 5)])
@pytest.mark.parametrize("sequence", [False, True])
def test_more_than_eight_experts_run_on_the_kernels(kernels, sequence, bias_shape):
    backend, device = kernels
    logits = torch.randn(19, 6, 5, device=device)
    target = torch.randint(5, (6,), device=device)
    bias = None if bias_shape is None else torch.randn(bias_shape, device=device)
    results = []
    for name in (backend, "reference"):
        leaf = logits.clone().requires_grad_()
        given = [expert.clone() for expert in leaf] if sequence else leaf
        loss = expert_cross_entropy(given, target, bias=bias, label_smoothing=0.1, backend=name)
        balanced = balanced_softmax_loss(given, target, [5, 4, 3, 2, 0], backend=name)
        results.append((loss.detach(), *torch.autograd.grad(loss + 2 * balanced.nan_to_num(posinf=0.0), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_more_than_eight_experts_choose_the_kernels():
    logits, target = torch.randn(9, 3, 4), torch.tensor([0, 1, 3])
    for loss in (expert_cross_entropy, lambda *a, **o: balanced_softmax_loss(*a, torch.ones(4), **o)):
        assert torch.equal(loss(logits, target), loss(logits, target, backend="cpu"))


def test_bias_of_other_types():
    logits, target = torch.randn(2, 3, 4), torch.tensor([0, 1, 3])
    for bias in (
        [5, 0, -1, 2],
        (5.0, 0.0, -1.0, 2.0),
        np.array([5, 0, -1, 2], np.float32),
        torch.tensor([5, 0, -1, 2]),
    ):
        expected = expert_cross_entropy(logits, target, bias=torch.tensor([5.0, 0, -1, 2]))
        assert torch.equal(expert_cross_entropy(logits, target, bias=bias), expected)
    both = [[5, 0, -1, 2], [1, 1, 0, 0]]
    expected = expert_cross_entropy(logits, target, bias=torch.tensor(both, dtype=torch.float32))
    assert torch.equal(expert_cross_entropy(logits, target, bias=both), expected)


def test_numbers_of_other_types():
    logits, target = torch.randn(2, 3, 4), torch.tensor([0, 1, 3])
    for number in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5), Fraction(1, 2)):
        expected = expert_cross_entropy(logits, target, label_smoothing=0.5)
        assert torch.equal(expert_cross_entropy(logits, target, label_smoothing=number), expected)
        weights = {"hardest_weight": number, "mutual_weight": number, "student_target_logit": number}
        expected = dkt_loss(logits, target, hardest_weight=0.5, mutual_weight=0.5, student_target_logit=0.5)
        assert torch.equal(dkt_loss(logits, target, **weights), expected)
    assert torch.equal(
        dkt_loss(logits, target, hardest_weight=np.int64(3)), dkt_loss(logits, target, hardest_weight=3.0)
    )
    for bad, kind in ((torch.ones(2), r"float32 \[2\]"), (np.ones(1), "ndarray"), (1j, "complex"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"^dkt_loss: hardest_weight must be a number, got {kind}$"):
            dkt_loss(logits, target, hardest_weight=bad)
    with pytest.raises(ValueError, match=r"^dkt_loss: hardest_weight must not require gradients, it is a constant$"):
        dkt_loss(logits, target, hardest_weight=torch.ones((), requires_grad=True))


def test_bias_is_differentiable():
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2, 2])
    for shape in ((5,), (3, 5)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda z, b: expert_cross_entropy(z, target, bias=b, label_smoothing=0.2), (logits, bias)
        )


def test_bias_is_added_in_the_accumulation_dtype():
    logits, target = torch.full((1, 1, 2), 1024.0, dtype=torch.float16), torch.tensor([0])
    bias = torch.tensor([0.0, 0.25])  # 1024.25 is 1024 in float16
    loss = expert_cross_entropy(logits, target, bias=bias)
    assert loss.item() == pytest.approx(F.cross_entropy(bias[None], target).item(), rel=1e-4)


def test_masked_class():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    logits = torch.randn(2, 4, 3, requires_grad=True)
    target = torch.tensor([0, 2, 2, 0])
    loss = expert_cross_entropy(logits, target, bias=bias)
    loss.backward()
    kept = logits.detach()[:, :, [0, 2]]
    torch.testing.assert_close(loss.detach(), expert_cross_entropy(kept, target // 2))
    assert (logits.grad[:, :, 1] == 0).all() and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, device, backend, widest):
    logits, target = 5 * torch.randn(3, 6, 10, device=device), torch.randint(10, (6,), device=device)
    bias = torch.randn(10, device=device)
    for case in (logits, logits.to(widest), logits.to(dtype)):
        loss = expert_cross_entropy(case, target, bias=bias, label_smoothing=0.1, backend=backend)
        with torch.autocast(device.type, dtype=dtype):
            other = expert_cross_entropy(case, target, bias=bias, label_smoothing=0.1, backend=backend)
        assert torch.equal(loss, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_and_empty_batch(dtype, device, backend):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=dtype, device=device, requires_grad=True)
    loss = expert_cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-2) and torch.isfinite(logits.grad).all()
    empty = torch.empty(2, 0, 3, dtype=dtype, device=device, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    zero = expert_cross_entropy(empty, nothing, label_smoothing=0.1, backend=backend)
    zero.backward()
    assert zero.item() == 0 and empty.grad.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in 0..1, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must lie in 0..1, got -0.1"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must be [C=5] or [K=3, C=5], got float32 [4]"),
        ({"bias": torch.zeros(5, 3)}, ValueError, "bias must be [C=5] or [K=3, C=5], got float32 [5, 3]"),
        ({"bias": [0.0] * 4}, ValueError, "bias must be [C=5] or [K=3, C=5], got float64 [4]"),
        (
            {"bias": [None] * 5},
            TypeError,
            "bias must be None or a tensor, list or array of numbers [C=5] or [K=3, C=5], got list",
        ),
        (
            {"bias": torch.zeros(5, dtype=torch.bool)},
            TypeError,
            "bias must be floating point or integer [C=5] or [K=3, C=5], got bool [5]",
        ),
        (
            {"bias": torch.zeros(5, device="meta")},
            ValueError,
            "bias must be on cpu as logits, got float32 [5] on meta",
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error) as caught:
        expert_cross_entropy(torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.int64), **options)
    assert str(caught.value) == f"expert_cross_entropy: {message}"
