"""Forward, loss and backward of resnet32 with three experts at CIFAR size: the ops with their default backends against
their reference implementations, in alternation.
"""

from collections.abc import Callable

import pytest
import torch

from shike_fast import models, ops
from shike_fast._util.cli import use_device
from shike_fast.ops._dispatch import OPERATORS, Backend

CASES = {"cpu": [(128, 3, 32, 32)], "cuda": [(128, 3, 32, 32)]}


@pytest.mark.op("resnet32, dkt_loss")
def test_step(case, device, monkeypatch, peak_memory, side_by_side):
    use_device(device)
    model = models.create_model("resnet32", num_classes=100).to(device, memory_format=torch.channels_last)
    images = torch.randn(case, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(100, (case[0],), device=device)
    known = {name: operator.backends for name, operator in OPERATORS.items()}

    def with_backends(backends: dict[str, dict[str, Backend]]) -> Callable[[], None]:
        def step() -> None:
            for name, operator in OPERATORS.items():
                monkeypatch.setattr(operator, "backends", backends[name])
            model.zero_grad(set_to_none=True)
            ops.dkt_loss(model(images), target).backward()

        return step

    calls = {
        "reference ops": with_backends({op: {"reference": backends["reference"]} for op, backends in known.items()}),
        "fused ops": with_backends(known),
    }
    facts = {name: {"peak_extra_bytes": peak_memory(call)} for name, call in calls.items()}
    side_by_side(calls, images=case[0], calls=2 if device.type == "cpu" else 20, rounds=9, facts=facts)
