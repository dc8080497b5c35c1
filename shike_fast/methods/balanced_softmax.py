"""Balanced softmax: the logarithm of the class counts is added to the logits in the loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from shike_fast import ops
from shike_fast.methods.base import Stage
from shike_fast.methods.families import Adjusted, Constant, plain_network, second_label
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")


@register_method
class BalancedSoftmax(Adjusted):
    """Balanced softmax, L = CE(z + log n, y): logit adjustment with tau = 1 and no eps.

    Published: the loss; no setting of its runs is known well enough for a recipe. Source: Ren et al., "Balanced
    Meta-Softmax", NeurIPS 2020.
    """

    name = "balanced-softmax"
    summary = "cross-entropy with the log class counts added to the logits"
    source = "Balanced Meta-Softmax (NeurIPS 2020)"
    stages = (TRAINING,)
    defaults: ClassVar = {"num_experts": 1}
    mixes = True

    def __post_init__(self) -> None:
        self.bias = Constant(ops.class_bias(self.class_counts, kind="counts"))

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return plain_network(settings)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.expert_loss(logits, target, bias=self.bias.of(logits), **second_label(inputs)), {}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs
