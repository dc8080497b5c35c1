"""``--ema``: a moving average of the weights, which is tested and kept in their place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from shike_fast import models


class WeightAverage:
    r"""An exponential moving average of a model's parameters, with its present statistics of BatchNorm.

    .. math:: d_t = \min(d, (1 + t) / (10 + t)), \qquad \bar w \leftarrow d_t \bar w + (1 - d_t) w

    after step t = 0, 1, ... of a stage: while it is young the average forgets quickly, as that of TensorFlow does with
    ``num_updates``. Each stage begins with t = 0, as it begins with a new optimizer. Buffers are copied.

    An update changes tensors in place and never waits for the device, so that it can be captured.

    Args:
        model: on its device, in its final layout; its parameters must stay the same tensors.
        decay: d, in [0, 1).

    Attributes:
        network: the average, a copy of the model.
        steps: int64 [] on the device, t.
    """

    def __init__(self, model: models.MultiExpertNetwork, decay: float) -> None:
        self.network = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._weights: list[Tensor] = list(model.parameters())
        self._averages: list[Tensor] = list(self.network.parameters())
        self._buffers, self._copies = list(model.buffers()), list(self.network.buffers())
        self.steps = torch.zeros((), dtype=torch.int64, device=self._averages[0].device)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step of the optimizer."""
        share = (9.0 / (10 + self.steps)).clamp(min=1 - self._decay)  # 1 - d_t
        changes = list(torch._foreach_sub(self._weights, self._averages))
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(self._averages, changes)
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        self.steps += 1

    def restart(self) -> None:
        """Begin a stage."""
        self.steps.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: ``model``, the averaged network's ``state_dict()``, and ``steps``."""
        return {"model": self.network.state_dict(), "steps": int(self.steps)}
