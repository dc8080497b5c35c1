"""NCL++: two networks that teach each other, and each itself, over several views of an image."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import at_least, option
from shike_fast.errors import ConfigError
from shike_fast.methods.base import Stage
from shike_fast.methods.ncl import CIFAR_RECIPE, EPS, Nested
from shike_fast.methods.registry import register_method

TERMS = ("cross_entropy", "hard_cross_entropy", "inter", "intra")
TRAINING = Stage("training", terms=TERMS)


@register_method
class NclPlus(Nested):
    """Nested collaborative learning between networks and between views.

        L = sum_k [ce_ratio CE(a_k) + hcm_ratio CE(h_k)] + F(the K networks) + sum_k F(the views within network k)
        F(x_1 ... x_m) = diversity_factor / (m (m-1) / 2) sum_{i != j} [D(x_j, x_i) + D_M(x_j, x_i)]

    with a, h and M of :class:`~shike_fast.methods.ncl.Nested` and D of :class:`~shike_fast.methods.ncl.Ncl`. D_M is
    that sum over M alone, with the probabilities of all classes; the views take the M of the first. F takes a, never h,
    and is 0 for m = 1. The batch shows each image ``intra_n`` times, view by view. Published: two networks, four views,
    and NCL's settings. Source: Tan et al., NCL++, Pattern Recognition 2024; where its code and the paper differ, the
    code.
    """

    name = "ncl++"
    summary = "two networks that teach each other over four views of an image"
    source = "NCL++ (Pattern Recognition)"
    stages = (TRAINING,)
    defaults: ClassVar = {"num_experts": 2}
    recipes: ClassVar = {"cifar10-lt": CIFAR_RECIPE, "cifar100-lt": CIFAR_RECIPE}

    intra_n: int = option(4, "views of an image", metavar="A", check=at_least(1))

    @classmethod
    def views(cls, settings: Any) -> tuple[str | None, ...]:
        return (None,) * settings.intra_n

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        experts, rows, classes = logits.shape
        if rows % self.intra_n:
            raise ConfigError(f"ncl++: the rows must be {self.intra_n} views of as many images each, got {rows}")
        hard = ops.hardest_classes(logits[0], target, self.hardest)
        adjusted = logits + self.bias.of(logits)
        ratios = self.ratios.of(logits)
        inter = self.weight_of(experts)
        kl = ops.ExpertKL("others", weight=inter, eps=EPS) if experts > 1 else None
        loss, parts = ops.expert_loss(adjusted, target, expert_weight=ratios[0], kl=kl, return_terms=True)
        of_hard = ops.expert_loss(adjusted, target, expert_weight=ratios[1], class_mask=hard, masked=self.hard_classes)
        total, between = loss + of_hard, parts[1]
        if experts > 1:
            partial = ops.expert_kl(adjusted, weight=inter, class_mask=hard, masked="partial", eps=EPS)
            total, between = total + partial, between + partial.detach()
        within = between.new_zeros(())
        if self.intra_n > 1:
            images = rows // self.intra_n
            views = adjusted.view(experts, self.intra_n, images, classes).transpose(0, 1)
            views = views.reshape(self.intra_n, experts * images, classes)  # the views as experts
            weight = self.weight_of(self.intra_n) * experts  # the sum over the networks, not their mean
            of_first = hard[:images].repeat(experts, 1)
            intra = ops.expert_kl(views, weight=weight, eps=EPS) + ops.expert_kl(
                views, weight=weight, class_mask=of_first, masked="partial", eps=EPS
            )
            total, within = total + intra, intra.detach()
        return total, dict(zip(TERMS, (parts[0], of_hard.detach(), between, within), strict=True))

    def weight_of(self, members: int) -> float:
        """What the divergences among so many networks or views are multiplied by."""
        return 2 * self.diversity_factor / (members * (members - 1)) if members > 1 else 0.0
