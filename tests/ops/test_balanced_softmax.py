"""balanced_softmax_loss against the golden data and its definition; classes without images."""

import numpy as np
import pytest
import torch

from shike_fast import nn
from shike_fast.ops import balanced_softmax_loss

OP = "balanced_softmax_loss"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(golden_case, dtype, backend, device, assert_golden):
    logits = golden_case.logits.to(device, dtype).requires_grad_()
    target, counts = golden_case.target.to(device), golden_case.class_counts.to(device)
    loss = balanced_softmax_loss(logits, target, counts, backend=backend)
    loss.backward()
    # The recorded values contain a logarithm in float32, which not every processor rounds alike.
    tolerance = 2e-7 if dtype == torch.float64 else 1e-5
    assert_golden(loss.detach(), logits.grad, golden_case.stage2_loss, golden_case.stage2_grad, tolerance)


@pytest.mark.parametrize("counts_dtype", [torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_definition(dtype, counts_dtype, device, backend):
    counts = torch.tensor([100, 40, 7, 2, 1], device=device)
    logits, target = torch.randn(3, 6, 5, device=device).to(dtype), torch.randint(5, (6,), device=device)
    leaf = logits.clone().requires_grad_()
    loss = balanced_softmax_loss(leaf, target, counts.to(counts_dtype), backend=backend)
    loss.backward()
    wide = (logits.double() + counts.double().log()).log_softmax(2)
    expected = -wide[:, torch.arange(6), target].sum() / 6
    gradient = (wide.exp() - torch.nn.functional.one_hot(target, 5)) / 6
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert (leaf.grad.double() - gradient).abs().max() <= tolerance * gradient.abs().max()


def in_float64(logits, target, counts):
    """The loss and its gradient, written out in NumPy."""
    z, n, y = (x.cpu().numpy() for x in (logits.double(), counts.double(), target))
    weights = n * np.exp(z - z.max(2, keepdims=True))
    p = weights / weights.sum(2, keepdims=True)
    rows = np.arange(len(y))
    return -np.log(p[:, rows, y]).sum() / len(y), (p - np.eye(len(n))[y]) / len(y)


def test_golden_cases_in_float64(golden_case, backend, device, widest):
    """The recorded logits and counts; loss and gradient against float64 instead of what was recorded."""
    logits = golden_case.logits.to(device, widest).requires_grad_()
    target, counts = golden_case.target.to(device), golden_case.class_counts.to(device)
    loss = balanced_softmax_loss(logits, target, counts, backend=backend)
    loss.backward()
    value, gradient = in_float64(logits.detach(), target, counts)
    tolerance = 1e-12 if widest == torch.float64 else 1e-5
    assert abs(loss.item() - value) <= tolerance * abs(value)
    assert np.abs(logits.grad.double().cpu().numpy() - gradient).max() <= tolerance * np.abs(gradient).max()


COUNT_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("counts_dtype", COUNT_DTYPES)
def test_float64_logits_take_the_logarithm_in_float64(counts_dtype, backend, device, widest):
    counts = torch.tensor([101, 43, 7, 3, 1], device=device, dtype=counts_dtype)
    logits, target = torch.randn(3, 6, 5, device=device, dtype=widest), torch.randint(5, (6,), device=device)
    value, _ = in_float64(logits, target, counts)
    tolerance = 1e-12 if widest == torch.float64 else 1e-6
    loss = nn.BalancedSoftmaxLoss(counts, backend=backend)(logits, target)
    assert loss.item() == pytest.approx(value, rel=tolerance)
    assert balanced_softmax_loss(list(logits), target, counts, backend=backend) == loss


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda n: np.array(n)[::-1][::-1], lambda n: np.uint16(n)])
def test_counts_of_other_types(kind, backend, device, widest):
    counts = [101, 43, 0, 3, 1]
    logits, target = torch.randn(3, 6, 5, device=device, dtype=widest), torch.zeros(6, dtype=torch.int64, device=device)
    expected = balanced_softmax_loss(logits, target, torch.tensor(counts, device=device).double(), backend=backend)
    assert torch.equal(balanced_softmax_loss(logits, target, kind(counts), backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_without_images_is_masked(dtype, device, backend):
    counts = torch.tensor([9, 0, 4, 0], device=device)
    logits = torch.randn(2, 5, 4, device=device).to(dtype).requires_grad_()
    target = torch.tensor([0, 2, 2, 0, 0], device=device)
    loss = balanced_softmax_loss(logits, target, counts, backend=backend)
    loss.backward()
    without = balanced_softmax_loss(logits.detach()[:, :, ::2], target // 2, counts[::2], backend=backend)
    torch.testing.assert_close(loss.detach(), without)
    assert (logits.grad[:, :, 1::2] == 0).all()
    assert torch.isfinite(logits.grad).all() and (logits.grad[:, :, ::2] != 0).all()


def test_class_without_images_as_target_is_infinite():
    logits = torch.zeros(1, 2, 3)
    assert balanced_softmax_loss(logits, torch.tensor([0, 1]), torch.tensor([3, 0, 1])).item() == torch.inf


def test_gradcheck_and_sequence():
    counts, target = torch.tensor([9, 3, 1, 0]), torch.tensor([0, 2, 1])
    logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *z: balanced_softmax_loss(z, target, counts), logits)
    stacked = balanced_softmax_loss(torch.stack(logits), target, counts)
    torch.testing.assert_close(balanced_softmax_loss(tuple(logits), target, counts), stacked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, device, backend, widest):
    counts = torch.randint(1, 500, (10,), device=device)
    logits, target = 5 * torch.randn(3, 6, 10, device=device), torch.randint(10, (6,), device=device)
    for case in (logits, logits.to(widest), logits.to(dtype)):
        loss = balanced_softmax_loss(case, target, counts, backend=backend)
        with torch.autocast(device.type, dtype=dtype):
            assert torch.equal(balanced_softmax_loss(case, target, counts, backend=backend), loss)


def test_empty_batch():
    logits = torch.empty(3, 0, 4, requires_grad=True)
    loss = balanced_softmax_loss(logits, torch.empty(0, dtype=torch.int64), torch.ones(4))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (3, 0, 4)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ("123", TypeError, "class_counts must be a tensor, list or array of numbers [C=3], got str"),
        (["1", "2", "3"], TypeError, "class_counts must be a tensor, list or array of numbers [C=3], got list"),
        ([torch.tensor(1)] * 3, TypeError, "class_counts must be a tensor, list or array of numbers [C=3], got list"),
        (np.array([1j, 2, 3]), TypeError, "class_counts must be a tensor, list or array of numbers [C=3], got ndarray"),
        ([1, 2], ValueError, "class_counts must be [C=3], got float64 [2]"),
        (torch.ones(4), ValueError, "class_counts must be [C=3], got float32 [4]"),
        (torch.ones(3, 1), ValueError, "class_counts must be [C=3], got float32 [3, 1]"),
        (
            torch.ones(3, dtype=torch.bool),
            TypeError,
            "class_counts must be integer or floating point [C=3], got bool [3]",
        ),
        (
            torch.ones(3, device="meta"),
            ValueError,
            "class_counts must be on cpu as logits, got float32 [3] on meta",
        ),
        (
            torch.ones(3, requires_grad=True),
            ValueError,
            "class_counts must not require gradients, they are constants of the loss",
        ),
        (
            torch.tensor([4, -1, 2]),
            ValueError,
            "class_counts must be finite, >= 0 and not all 0, got values from -1 to 4",
        ),
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            "class_counts must be finite, >= 0 and not all 0, got values from 0 to 0",
        ),
        (
            torch.tensor([1.0, torch.nan, 2.0]),
            ValueError,
            "class_counts must be finite, >= 0 and not all 0, got values from nan to nan",
        ),
        (
            torch.tensor([1.0, torch.inf, 2.0]),
            ValueError,
            "class_counts must be finite, >= 0 and not all 0, got values from 1.0 to inf",
        ),
    ],
)
def test_bad_counts(counts, error, message):
    with pytest.raises(error) as caught:
        balanced_softmax_loss(torch.zeros(2, 2, 3), torch.tensor([0, 1]), counts)
    assert str(caught.value) == f"balanced_softmax_loss: {message}"
