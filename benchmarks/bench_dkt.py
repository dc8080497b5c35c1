"""dkt_loss, forward and backward. Floor: the logits are read twice and their gradient is written once."""

import pytest
import torch

from shike_fast import ops

pytestmark = pytest.mark.benchmark(max_time=0.5)

SHAPES = [(3, 128, 100), (3, 256, 1000), (3, 256, 8142)]  # CIFAR-100-LT, ImageNet-LT, iNaturalist 2018


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dkt_loss(shape, contender, device, prepare, rotate, measure):
    _, batch, classes = shape
    logit_bytes = 4 * torch.Size(shape).numel()

    def make():
        logits = (5 * torch.randn(shape, device=device)).requires_grad_()
        return logits, torch.randint(classes, (batch,), device=device)

    measure(prepare(contender, ops.dkt_loss), rotate(make, logit_bytes), floor_bytes=3 * logit_bytes)
