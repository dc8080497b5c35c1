"""Sums over the steps of an epoch, kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shike_fast.engine.metrics import mean_logits

# columns, all weighted by images
_LOSS, _CORRECT, _IMAGES, _FIRST_TERM = 0, 1, 2, 3


class Totals:
    """What the steps of an epoch have added up to. Tensors are changed in place, as a recorded step has to.

    Attributes:
        terms: names of the loss's terms.
        sums: float64 [3 + number of terms]: loss, correctly classified images, images, and the terms.
        steps: int64 [], optimizer steps of the epoch.
        bad_step: int64 [], the first of them with a loss that is not finite, 0 for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self.track(())

    def track(self, terms: Sequence[str], scores: Callable[[Tensor], Tensor] = mean_logits) -> None:
        """Begin anew for a loss with these terms.

        Args:
            terms: their names.
            scores: the prediction, logits [K, B, C] -> [B, C].
        """
        self.terms = tuple(terms)
        self._scores = scores
        self.sums = torch.zeros(_FIRST_TERM + len(self.terms), dtype=torch.float64, device=self.steps.device)

    @torch.no_grad()
    def add(self, loss: Tensor, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: [], its mean over the batch.
            terms: those of its terms, each [].
            logits: [K, B, C].
            labels: int64 [B].
        """
        size = len(labels)
        correct = (self._scores(logits.float()).argmax(-1) == labels).sum()
        named = [terms[name] for name in self.terms]
        means = torch.stack([loss, correct / size, loss.new_ones(()), *named])
        self.sums += means.double() * size
        bad = (self.bad_step == 0) & ~loss.isfinite()
        self.bad_step.copy_(torch.where(bad, self.steps + 1, self.bad_step))

    def count(self) -> None:
        """Note the end of an optimizer step."""
        self.steps += 1

    def begin(self, steps: int, sums: list[float] | None = None) -> None:
        """Set the totals to those after ``steps`` steps of an epoch, zeros without ``sums``.

        Version 0.1.0 stored three terms in every stage, zeros where it had none: what is too much is left out.
        """
        self.sums.zero_()
        if sums:
            self.sums.copy_(torch.tensor(sums[: len(self.sums)], dtype=torch.float64))
        self.steps.fill_(steps)
        self.bad_step.zero_()


class Means:
    """Totals of all processes, read from the device.

    Args:
        sums: the sum of their :attr:`Totals.sums`.
        terms: the names of the terms.
    """

    def __init__(self, sums: list[float], terms: Sequence[str] = ()) -> None:
        self.sums = sums
        self.images = sums[_IMAGES]
        self.loss = sums[_LOSS] / self.images
        self.accuracy = 100 * sums[_CORRECT] / self.images  # percent
        self.terms = {name: total / self.images for name, total in zip(terms, sums[_FIRST_TERM:], strict=False)}
