"""Each method's loss, forward and backward, against its published formulation in eager PyTorch and torch.compile of it.

The peers are those of ``peer_losses.py``; both sides are in the phase of the last epochs, ``los`` in its second stage.
Experts are a list of K tensors for a peer, as the published networks return them, and one tensor [K, B, C] here. Three
experts learn by each method, in one that is published for a single expert as well. ``--benchmark-disable`` makes one
quick round.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peer_losses import PEERS
from torch import Tensor

from shike_fast import methods

EXPERTS = 3
ROUND = 0.1  # seconds that a contender takes in a round, more or less
ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.method} {self.shape}"


CIFAR, INATURALIST, LARGE = (EXPERTS, 128, 100), (EXPERTS, 256, 8142), (EXPERTS, 4096, 8142)
CASES = {
    device: [Case(name, shape) for name in methods.list_methods() for shape in shapes]
    for device, shapes in {"cpu": (CIFAR, INATURALIST), "cuda": (CIFAR, LARGE)}.items()
}


def contenders_of(case: Case, device: torch.device) -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """The losses by contender, and whether it takes a list of experts."""
    counts = torch.logspace(3.1, 0.7, case.shape[2], dtype=torch.float64).round().to(device)
    peer = PEERS[case.method](counts, EXPERTS).float().to(device)
    method = methods.create_method(case.method, class_counts=counts.long(), num_experts=EXPERTS)
    late = method.phase(method.epochs - 1)
    torch._dynamo.reset()
    return {
        "peer": (peer, True),
        "peer, torch.compile": (torch.compile(peer, dynamic=False), True),
        "shike_fast": (lambda z, y: method.loss(z, y, epoch=late)[0], False),
    }


def input_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, of ``ldam-drw`` cosines, and labels that hold for two and four views of an image."""
    _, rows, classes = case.shape
    logits = (1 / 6 if case.method == "ldam-drw" else 5) * torch.randn(case.shape, device=device)
    return logits, torch.randint(classes, (rows // 4,), device=device).repeat(4)


def forward_backward(
    loss_of: Callable[..., Tensor], experts: bool, sets: list[tuple[Tensor, Tensor]]
) -> Callable[[], Tensor]:
    """A call that takes the next input, and returns the loss."""
    leaves = []
    for logits, target in sets:
        given: Any = [z.clone().requires_grad_() for z in logits] if experts else logits.clone().requires_grad_()
        leaves.append((given, target))
    upcoming = itertools.cycle(leaves)

    def call() -> Tensor:
        given, target = next(upcoming)
        loss = loss_of(given, target)
        torch.autograd.grad(loss, given)
        return loss.detach()

    return call


@pytest.mark.op("loss of a method")
def test_method_loss(case, device, clock, rotate, peak_memory, side_by_side):
    sets = rotate(lambda: input_of(case, device), torch.Size(case.shape).numel() * 4)
    calls = {
        name: forward_backward(loss_of, experts, sets)
        for name, (loss_of, experts) in contenders_of(case, device).items()
    }
    values = {name: call() for name, call in calls.items()}  # of the first input
    for name, value in values.items():
        torch.testing.assert_close(value, values["peer"], rtol=1e-3, atol=1e-4, msg=f"{name} has another value")
    begin = clock()
    calls["peer"]()
    number = max(1, min(300, round(ROUND / (clock() - begin))))
    facts = {name: {"peak_extra_bytes": peak_memory(call)} for name, call in calls.items()}
    side_by_side(calls, calls=number, rounds=ROUNDS, facts=facts, compact=True)
