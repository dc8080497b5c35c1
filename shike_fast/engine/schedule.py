"""Learning-rate schedules, once for each stage: linear warm-up, then half a cosine to zero or a few steps down."""

from __future__ import annotations

import math
from collections.abc import Sequence

PUBLISHED_STEPS = (160, 180)  # of RIDE, BalPoE and LDAM-DRW
PUBLISHED_EPOCHS = 200


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
    _check("cosine_with_warmup", epoch, epochs, warmup_epochs)
    if epoch < warmup_epochs:
        return start_lr + (base_lr - start_lr) * (epoch + 1) / (warmup_epochs + 1)
    return base_lr / 2 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def steps_with_warmup(
    epoch: int,
    epochs: int,
    *,
    base_lr: float,
    warmup_epochs: int,
    start_lr: float,
    steps: Sequence[int],
    factor: float,
) -> float:
    """Learning rate of one epoch.

    With ``w`` warm-up epochs the rate climbs in equal steps from ``start_lr`` (exclusive) to ``base_lr``, which the
    last of them has; from there it stays, and is multiplied by ``factor`` after each of the named numbers of epochs::

        warm(e) = start_lr + (base_lr - start_lr) * (e + 1) / w   for e < w, else base_lr
        rate(e) = warm(e) * factor ** (number of steps <= e)

    With the published CIFAR-100-LT values of RIDE (200 epochs, base 0.1, start 0, five warm-up epochs, steps after 160
    and 180 epochs, factor 0.01): 0.02, 0.04, 0.06, 0.08, 0.1, then 0.1 up to the 160th epoch, 0.001 up to the 180th,
    and 0.00001. The warm-up is that of RIDE's code; :func:`cosine_with_warmup` reaches ``base_lr`` one epoch later.

    Args:
        epoch: 0-based epoch within the stage.
        epochs: number of epochs of the stage.
        base_lr: highest learning rate.
        warmup_epochs: ``w``; must leave at least one epoch.
        start_lr: rate from which the warm-up climbs.
        steps: numbers of epochs after which the rate is multiplied.
        factor: what it is multiplied by.

    Returns:
        The learning rate.

    Raises:
        ValueError: if ``epoch`` lies outside the stage or the warm-up fills it.
    """
    _check("steps_with_warmup", epoch, epochs, warmup_epochs)
    warm = base_lr
    if epoch < warmup_epochs:
        warm = start_lr + (base_lr - start_lr) * (epoch + 1) / warmup_epochs
    return warm * factor ** sum(step <= epoch for step in steps)


def scaled_steps(steps: Sequence[int], epochs: int, *, of: int) -> tuple[int, ...]:
    """The steps of a schedule of ``of`` epochs in one of ``epochs``: at the same shares of it, within it.

    Args:
        steps: numbers of epochs, each at least 1.
        epochs: length of the stage.
        of: length of the stage that ``steps`` belong to.

    Returns:
        As many numbers from 1 to ``epochs - 1``; none where the stage is too short for any.
    """
    if epochs < 2 or of < 1:
        return ()
    return tuple(min(max(1, round(step * epochs / of)), epochs - 1) for step in steps)


def _check(name: str, epoch: int, epochs: int, warmup_epochs: int) -> None:
    if not 0 <= epoch < epochs:
        raise ValueError(f"{name}: epoch must be in [0, {epochs}), got {epoch}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"{name}: warmup_epochs must be in [0, {epochs}), got {warmup_epochs}")
