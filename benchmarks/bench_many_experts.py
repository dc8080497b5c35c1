"""Sixty experts, as DirMixE draws them: expert_cross_entropy, which takes eight at a time, beside plain PyTorch."""

import pytest
import torch
from torch.nn import functional as F

from shike_fast import ops

CASES = {device: [(60, 128, 100), (60, 128, 1000)] for device in ("cpu", "cuda")}


@pytest.mark.op("expert_cross_entropy")
def test_many_experts(case, device, side_by_side):
    experts, batch, classes = case
    logits = (5 * torch.randn(case, device=device)).requires_grad_()
    bias, target = torch.randn(experts, classes, device=device), torch.randint(classes, (batch,), device=device)

    def loop():
        return sum(F.cross_entropy(z + b, target) for z, b in zip(logits.unbind(0), bias.unbind(0), strict=True))

    def all_rows():
        rows = (logits + bias[:, None]).flatten(0, 1)
        return experts * F.cross_entropy(rows, target.repeat(experts))

    losses = {
        "loop of F.cross_entropy": loop,
        "one F.cross_entropy of all rows": all_rows,
        "that under torch.compile": torch.compile(all_rows),
        "by groups of eight": lambda: ops.expert_cross_entropy(logits, target, bias=bias),
        "reference": lambda: ops.expert_cross_entropy(logits, target, bias=bias, backend="reference"),
    }
    values = [loss().detach() for loss in losses.values()]
    torch.testing.assert_close(values, [values[0]] * len(values), rtol=1e-4, atol=0.0)

    def step(loss):
        loss().backward()
        logits.grad = None

    calls = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    side_by_side(calls, images=batch, calls=5, rounds=9, facts={name: {} for name in calls})
