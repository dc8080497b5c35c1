"""Sums over the steps of an epoch, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

TERMS = ("cross_entropy", "hardest", "mutual")
# columns, all weighted by images
_LOSS, _CORRECT, _IMAGES, _FIRST_TERM = 0, 1, 2, 3


class Totals:
    """What the steps of an epoch have added up to. Tensors are changed in place, as a recorded step has to.

    Attributes:
        sums: float64 [6]: loss, correctly classified images, images, and the loss's three terms.
        steps: int64 [], optimizer steps of the epoch.
        bad_step: int64 [], the first of them with a loss that is not finite, 0 for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(_FIRST_TERM + len(TERMS), dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, terms: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: [], its mean over the batch.
            terms: [3], those of its terms.
            logits: [K, B, C].
            labels: int64 [B].
        """
        size = len(labels)
        correct = (logits.float().mean(0).argmax(-1) == labels).sum()
        means = torch.cat([torch.stack([loss.detach(), correct / size, loss.new_ones(())]), terms])
        self.sums += means.double() * size
        bad = (self.bad_step == 0) & ~loss.isfinite()
        self.bad_step.copy_(torch.where(bad, self.steps + 1, self.bad_step))

    def count(self) -> None:
        """Note the end of an optimizer step."""
        self.steps += 1

    def begin(self, steps: int, sums: list[float] | None = None) -> None:
        """Set the totals to those after ``steps`` steps of an epoch, zeros without ``sums``."""
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64)) if sums else self.sums.zero_()
        self.steps.fill_(steps)
        self.bad_step.zero_()


class Means:
    """Totals of all processes, read from the device.

    Args:
        sums: the sum of their :attr:`Totals.sums`.
    """

    def __init__(self, sums: list[float]) -> None:
        self.sums = sums
        self.images = sums[_IMAGES]
        self.loss = sums[_LOSS] / self.images
        self.accuracy = 100 * sums[_CORRECT] / self.images  # percent
        self.terms = {name: total / self.images for name, total in zip(TERMS, sums[_FIRST_TERM:], strict=True)}
