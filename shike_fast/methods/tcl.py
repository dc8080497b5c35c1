"""TCL: experts teach each other what they know to be right, and agree on what misleads all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shike_fast import ops
from shike_fast._util.options import Check, not_negative, option, positive
from shike_fast.methods.base import Stage
from shike_fast.methods.families import Adjusted, Constant, check_numbers, sum_over_processes
from shike_fast.methods.registry import register_method

TERMS = ("cross_entropy", "trusted", "consensus")
TRAINING = Stage("training", terms=TERMS)


@register_method
class Tcl(Adjusted):
    """Trust-calibrated collaborative learning, from secondary sources: there is no published code.

        L     = sum_k CE(z_k + delta_k log pi, y) + sum_k sum_{j != k} trust_kb KL(p_k || p_j) + consensus_weight L_CEC
        trust = 1[argmax p_k = y] w[y],    w[c] = C sqrt(1 - acc[c]) / sum_j sqrt(1 - acc[j])
        L_CEC = sum_k mean_b KL(softmax(r) || softmax(z_k with z_k[y] = -30))

    acc is a moving average of the class's accuracy, of all experts. r is for a consensus on what misleads: N are the
    classes with a higher mean logit than the label; r[c] is the mean over N of the mean logits for c in N, -30 for y,
    and the mean logit elsewhere.

    On SHIKE's network. **Unverified**, and chosen here: log pi as the adjustment and its sign, its absence from p_k,
    gradients through the teachers k (on) and through r (off), the average's decay 0.9 a step in which a class occurs,
    and its start 0; that L_CEC counts every image that has such an N; epochs and rates, which are the data set's.
    Source: TCL, CVPR 2026, as quoted by others.
    """

    name = "tcl"
    summary = "experts that teach each other where they are right; no published code"
    source = "TCL (CVPR 2026), from secondary sources"
    stages = (TRAINING,)

    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    deltas: tuple[float, ...] = option((0.9, 1.0, 1.1), "weight of the log prior for each expert")
    consensus_weight: float = option(0.02, "weight of the consensus on what misleads", check=not_negative)
    silenced_logit: float = option(-30.0, "logit of the label within that consensus")
    accuracy_decay: float = option(
        0.9, "of the moving average of a class's accuracy", check=Check("in [0, 1)", lambda value: 0 <= value < 1)
    )

    def __post_init__(self) -> None:
        check_numbers(self, "deltas", self.deltas)
        self.bias = Constant(torch.stack([ops.class_bias(self.class_counts, delta) for delta in self.deltas]))
        self.accuracy = torch.zeros(len(self.class_counts), device=self.class_counts.device)
        self.step = self.accuracy.new_zeros(
            2, len(self.class_counts)
        )  # images of a class seen, and share of right ones

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return {"scale": settings.scale}

    def class_trust(self) -> Tensor:
        """w: [C]."""
        lack = (1 - self.accuracy).clamp_min(0).sqrt()
        return len(lack) * lack / lack.sum().clamp_min(torch.finfo(lack.dtype).tiny)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        trusted = ops.ExpertKL(
            "others", weight=self.class_trust()[target], gate="teacher_correct", detach=False, adjusted=False
        )
        loss, parts = ops.expert_loss(logits, target, bias=self.bias.of(logits), kl=trusted, return_terms=True)
        with torch.no_grad():
            right = (logits.argmax(2) == target).to(self.step.dtype).mean(0)  # [B]
            self.step.index_add_(1, target, torch.stack([torch.ones_like(right), right]))
        consensus = self.consensus_weight * consensus_loss(logits, target, self.silenced_logit)
        terms = (*parts.unbind(), consensus.detach())
        return loss + consensus, dict(zip(TERMS, terms, strict=True))

    def after_step(self, model: nn.Module) -> None:
        seen, right = sum_over_processes(self.step)
        moved = self.accuracy.lerp(right / seen.clamp_min(1), 1 - self.accuracy_decay)
        self.accuracy.copy_(torch.where(seen > 0, moved, self.accuracy))
        self.step.zero_()

    def phase(self, epoch: int) -> int:
        return 0  # what changes lies in a tensor

    def state(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy}

    def load_state(self, state: dict[str, Any]) -> None:
        self.accuracy.copy_(state["accuracy"])


def consensus_loss(logits: Tensor, target: Tensor, silenced_logit: float = -30.0) -> Tensor:
    """The divergence of each expert from what the experts together take for more likely than the label.

    Args:
        logits: [K, B, C].
        target: int64 [B].
        silenced_logit: what takes the place of the label's logit.

    Returns:
        A scalar, L_CEC of :class:`Tcl`; images whose label has the highest mean logit count 0.
    """
    label = torch.zeros_like(logits[0], dtype=torch.bool).scatter_(1, target.unsqueeze(1), True)
    mean = logits.detach().mean(0)
    above = (mean > mean.gather(1, target.unsqueeze(1))) & ~label  # N, [B, C]
    count = above.sum(1, keepdim=True)
    common = torch.where(above, mean, 0).sum(1, keepdim=True) / count.clamp_min(1)
    teacher = torch.where(above, common, mean).masked_fill(label, silenced_logit)
    students = logits.masked_fill(label, silenced_logit)
    return ops.expert_kl(students, teacher, gate=(count.squeeze(1) > 0).to(logits.dtype))
