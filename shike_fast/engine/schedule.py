"""Learning-rate schedule: linear warm-up, then half a cosine to zero, once for each stage."""

from __future__ import annotations

import math


def cosine_with_warmup(epoch: int, epochs: int, *, base_lr: float, warmup_epochs: int, start_lr: float) -> float:
    """Learning rate of one epoch.

    With ``w`` warm-up epochs the rate climbs in equal steps from ``start_lr`` (exclusive) and would reach ``base_lr``
    at epoch ``w``; from there it follows half a cosine to zero::

        e < w:   start_lr + (base_lr - start_lr) * (e + 1) / (w + 1)
        e >= w:  base_lr / 2 * (1 + cos(pi * (e - w) / (epochs - w)))

    With the published CIFAR-100-LT values (stage 1: 180 epochs, base 0.15, start 0; stage 2: 20 epochs, base 0.1, start
    0.025; both five warm-up epochs) this gives the published rates: 0.025, 0.05, ..., 0.125 then ``0.075 * (1 +
    cos(...))``; 0.0375, 0.05, ..., 0.0875 then ``0.05 * (1 + cos(...))``.

    Args:
        epoch: 0-based epoch within the stage.
        epochs: number of epochs of the stage.
        base_lr: highest learning rate.
        warmup_epochs: ``w``; must leave at least one epoch for the cosine.
        start_lr: rate from which the warm-up climbs.

    Returns:
        The learning rate.

    Raises:
        ValueError: if ``epoch`` lies outside the stage or the warm-up fills it.
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"cosine_with_warmup: epoch must be in [0, {epochs}), got {epoch}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"cosine_with_warmup: warmup_epochs must be in [0, {epochs}), got {warmup_epochs}")
    if epoch < warmup_epochs:
        return start_lr + (base_lr - start_lr) * (epoch + 1) / (warmup_epochs + 1)
    return base_lr / 2 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))
