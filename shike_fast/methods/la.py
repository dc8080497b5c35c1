"""Logit adjustment: the log prior is added to the logits in the loss, or taken off the scores of plain training."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import not_negative, option
from shike_fast.methods.base import Stage
from shike_fast.methods.families import Adjusted, Constant, plain_network, second_label
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")


@register_method
class LogitAdjustment(Adjusted):
    """Logit adjustment, as a loss or post hoc.

        L = CE(z + b, y),    or post hoc  L = CE(z, y) with the scores z - b,    b[c] = log(pi[c]^tau + eps)

    The published eps is outside of the power: from tau = 2 on, rare classes saturate towards log eps. The published
    runs count steps, which no recipe here follows. Source: Menon et al., "Long-Tail Learning via Logit Adjustment",
    ICLR 2021.
    """

    name = "la"
    summary = "logit adjustment, in the loss or post hoc"
    source = "Logit Adjustment (ICLR 2021)"
    stages = (TRAINING,)
    defaults: ClassVar = {"num_experts": 1}
    mixes = True

    tau: float = option(1.0, "weight of the log prior", check=not_negative)
    eps: float = option(1e-12, "added to the prior's power within the logarithm", check=not_negative)
    post_hoc: bool = option(False, "train with plain cross-entropy and adjust the scores")

    def __post_init__(self) -> None:
        self.bias = Constant(ops.class_bias(self.class_counts, self.tau, eps=self.eps, power=True))

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return plain_network(settings)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        bias = None if self.post_hoc else self.bias.of(logits)
        return ops.expert_loss(logits, target, bias=bias, **second_label(inputs)), {}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs

    def scores(self, logits: Tensor, *, stage: Stage) -> Tensor:
        mean = logits.mean(0)
        return mean - self.bias.of(logits) if self.post_hoc else mean
