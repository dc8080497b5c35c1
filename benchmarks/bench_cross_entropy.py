"""expert_cross_entropy and balanced_softmax_loss, forward and backward, with PyTorch's own cross-entropy as a peer.

Floor: the logits are read twice and their gradient is written once.
"""

import pytest
import torch
from torch.nn import functional as F

from shike_fast import ops

pytestmark = pytest.mark.benchmark(max_time=0.5)

SHAPES = [(3, 128, 100), (3, 256, 1000)]


def inputs_of(shape, device):
    """Logits, targets, and class counts that fall from 1280 to 5."""
    _, batch, classes = shape
    counts = torch.logspace(3.1, 0.7, classes, device=device).long()

    def make():
        logits = (5 * torch.randn(shape, device=device)).requires_grad_()
        return logits, torch.randint(classes, (batch,), device=device), counts

    return make


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced_softmax_loss(shape, contender, device, prepare, rotate, measure):
    logit_bytes = 4 * torch.Size(shape).numel()
    input_sets = rotate(inputs_of(shape, device), logit_bytes)
    measure(prepare(contender, ops.balanced_softmax_loss), input_sets, floor_bytes=3 * logit_bytes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expert_cross_entropy(shape, contender, device, prepare, rotate, measure):
    logit_bytes = 4 * torch.Size(shape).numel()
    input_sets = [(z, y) for z, y, _ in rotate(inputs_of(shape, device), logit_bytes)]
    measure(prepare(contender, ops.expert_cross_entropy), input_sets, floor_bytes=3 * logit_bytes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_peer_functional_cross_entropy(shape, device, rotate, measure):
    """The same value as expert_cross_entropy in two calls of PyTorch: the experts folded into the batch."""
    experts, _, classes = shape
    logit_bytes = 4 * torch.Size(shape).numel()
    input_sets = [(z, y) for z, y, _ in rotate(inputs_of(shape, device), logit_bytes)]

    def peer(logits, target):
        return experts * F.cross_entropy(logits.reshape(-1, classes), target.repeat(experts))

    torch.testing.assert_close(peer(*input_sets[0]), ops.expert_cross_entropy(*input_sets[0]))
    measure(peer, input_sets, floor_bytes=3 * logit_bytes)
