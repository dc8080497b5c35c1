"""dkt_loss, expert_cross_entropy and balanced_softmax_loss, forward and backward.

Floor: the logits are read once and their gradient is written once. Peer: PyTorch's own cross-entropy.
"""

import pytest
import torch
from torch.nn import functional as F

from shike_fast import ops

pytestmark = pytest.mark.benchmark(max_time=0.5)

# CIFAR-100-LT, ImageNet-LT, iNaturalist 2018; a GPU gets the batch of large-scale training.
CIFAR, IMAGENET, INATURALIST = (3, 128, 100), (3, 256, 1000), (3, 256, 8142)
CASES = {
    "cpu": [(shape, torch.float32) for shape in (CIFAR, IMAGENET, INATURALIST)],
    "cuda": [
        (shape, dtype) for shape in (CIFAR, IMAGENET, (3, 4096, 8142)) for dtype in (torch.float32, torch.bfloat16)
    ],
}


@pytest.fixture
def inputs(case, device, rotate):
    """Input sets (logits, target, class counts that fall from 1280 to 5), and the bytes at the floor."""
    shape, dtype = case
    _, batch, classes = shape
    counts = torch.logspace(3.1, 0.7, classes, device=device).long()

    def make():
        logits = (5 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
        return logits, torch.randint(classes, (batch,), device=device), counts

    logit_bytes = torch.Size(shape).numel() * dtype.itemsize
    return rotate(make, logit_bytes), 2 * logit_bytes


def without_counts(inputs):
    sets, floor_bytes = inputs
    return [(logits, target) for logits, target, _ in sets], floor_bytes


@pytest.mark.op("dkt_loss")
def test_dkt_loss(inputs, contender, prepare, measure):
    measure(prepare(contender, ops.dkt_loss), *without_counts(inputs))


@pytest.mark.op("balanced_softmax_loss")
def test_balanced_softmax_loss(inputs, contender, prepare, measure):
    measure(prepare(contender, ops.balanced_softmax_loss), *inputs)


@pytest.mark.op("expert_cross_entropy")
def test_expert_cross_entropy(inputs, contender, prepare, measure):
    measure(prepare(contender, ops.expert_cross_entropy), *without_counts(inputs))


@pytest.mark.op("expert_cross_entropy")
def test_peer_functional_cross_entropy(inputs, measure):
    """The same value as expert_cross_entropy in two calls of PyTorch: the experts folded into the batch."""
    sets, floor_bytes = without_counts(inputs)

    def peer(logits, target):
        experts, _, classes = logits.shape
        return experts * F.cross_entropy(logits.reshape(-1, classes).float(), target.repeat(experts))

    torch.testing.assert_close(peer(*sets[0]), ops.expert_cross_entropy(*sets[0]))
    measure(peer, sets, floor_bytes)
