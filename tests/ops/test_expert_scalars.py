"""Tensors without dimensions, which stay on the device, count as the number that they hold."""

import pytest
import torch

from shike_fast import ops


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True), torch.randint(8, (6,)), torch.randint(8, (6,))


def value_and_gradient(loss, logits):
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_share_of_the_first_label(batch, backend):
    z, y, other = batch
    results = [
        value_and_gradient(ops.expert_loss(z, y, target_b=other, lam=lam, backend=backend), z)
        for lam in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64))
    ]
    for value, gradient in results[1:]:
        assert torch.allclose(value, results[0][0]) and torch.allclose(gradient, results[0][1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("teacher", ["others", "mean", "view"])
def test_the_weight_of_a_divergence(batch, backend, teacher):
    z, _, _ = batch
    number, tensor = (
        value_and_gradient(ops.expert_kl(z, teacher, weight=weight, backend=backend), z)
        for weight in (-0.7, torch.tensor(-0.7, dtype=torch.float64))
    )
    assert torch.allclose(number[0], tensor[0]) and torch.allclose(number[1], tensor[1])
