"""expert_cross_entropy against torch.nn.functional.cross_entropy, expert by expert, and its closed-form gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shike_fast.ops import expert_cross_entropy

OP = "expert_cross_entropy"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected(logits, target, bias, label_smoothing):
    """Loss and gradient in float64: dz_k = ((p_k − (1 − ε)·[c = y] − ε/C) / B)."""
    experts, batch, classes = logits.shape
    z = logits.double() + (0 if bias is None else bias.double().reshape(-1, 1, classes))
    loss = sum(F.cross_entropy(z[k], target, label_smoothing=label_smoothing) for k in range(experts))
    soft = (1 - label_smoothing) * F.one_hot(target, classes) + label_smoothing / classes
    return loss, (z.softmax(2) - soft) / batch


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(2, 50)),
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
        ({"bias": [0.0] * 5}, TypeError, "bias must be None or a tensor [C=5] or [K=3, C=5], got list"),
        (
            {"bias": torch.zeros(5, dtype=torch.int64)},
            TypeError,
            "bias must be floating point [C=5] or [K=3, C=5], got int64 [5]",
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
