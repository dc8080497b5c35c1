"""The usual baseline: one plain network with cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shike_fast import ops
from shike_fast.methods.base import Method, Stage
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")


@register_method
class CrossEntropy(Method):
    """The backbone without fusion, with a linear classifier."""

    name = "ce"
    summary = "one plain network with cross-entropy"
    stages = (TRAINING,)
    experts = 1
    mixes = True

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return {"fusion": False, "classifier": "linear"}

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = ops.expert_cross_entropy(logits, target)
        if "lam" not in inputs:
            return loss, {}
        lam = inputs["lam"]
        return lam * loss + (1 - lam) * ops.expert_cross_entropy(logits, inputs["target_b"]), {}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs
