"""One step of SGD with momentum and weight decay for all parameters of a network: what ``--optimizer`` chooses among.

``for loop`` and ``foreach`` are PyTorch's other forms of the same step, ``fused`` its single pass, the default ``sgd``;
``apex`` is NVIDIA's FusedSGD, which takes part where Apex is installed with its CUDA extensions.
"""

import copy

import pytest
import torch

from shike_fast import models
from shike_fast.engine.optimizer import make_optimizer, require_apex, set_lr
from shike_fast.errors import ConfigError

CASES = {"cpu": ["resnet32"], "cuda": ["resnet32", "resnet50"]}
CALLS = {"resnet32": 50, "resnet50": 5}
OPTIONS = {"momentum": 0.9, "weight_decay": 5e-4}
LR = 1e-6


def apex_works(device: torch.device) -> bool:
    try:
        require_apex(device)
    except ConfigError:
        return False
    return True


@pytest.mark.op("SGD")
def test_optimizer(case, device, peak_memory, side_by_side):
    model = models.create_model(case, num_classes=100).to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(0)

    def parameters() -> list[torch.nn.Parameter]:
        own = list(copy.deepcopy(model).parameters())
        for parameter in own:
            parameter.grad = torch.empty_like(parameter).normal_(generator=generator)
        return own

    optimizers = {
        "for loop": torch.optim.SGD(parameters(), lr=LR, foreach=False, fused=False, **OPTIONS),
        "foreach": torch.optim.SGD(parameters(), lr=LR, foreach=True, **OPTIONS),
        "fused": make_optimizer("sgd", parameters(), **OPTIONS),
    }
    if apex_works(device):
        optimizers["apex"] = make_optimizer("apex", parameters(), **OPTIONS)
    for optimizer in optimizers.values():
        set_lr(optimizer, LR)
        optimizer.step()  # makes the momentum
    facts = {name: {"peak_extra_bytes": peak_memory(optimizer.step)} for name, optimizer in optimizers.items()}
    side_by_side(
        {name: optimizer.step for name, optimizer in optimizers.items()}, calls=CALLS[case], rounds=9, facts=facts
    )
