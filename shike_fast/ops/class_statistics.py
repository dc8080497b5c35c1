"""What losses derive from the class counts, and from the logits of a row: biases, margins, weights, hardest classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from shike_fast.ops._checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    as_tensor,
    check_dense,
    check_finite,
    check_logits,
    check_target,
    describe,
    values_are_readable,
)

if TYPE_CHECKING:
    import numpy as np

Counts: TypeAlias = "Tensor | Sequence[int] | np.ndarray"
KINDS = ("prior", "counts", "reverse")


def class_bias(
    class_counts: Counts,
    tau: float = 1.0,
    *,
    eps: float = 0.0,
    kind: Literal["prior", "counts", "reverse"] = "prior",
    power: bool = False,
) -> Tensor:
    """Compute what a loss adds to the logits of a class, for its frequency.

        b[c] = tau log(x[c] + eps),    with power  b[c] = log(x[c]^tau + eps)

    where x is n / sum n (``"prior"``), n (``"counts"``), or the prior in reverse order (``"reverse"``): the class of
    ascending rank r has that of rank C-1-r, where of equal counts the lower class has the lower rank.

    Args:
        class_counts: n, [C], training images of each class; numbers of at least 0. A class without images gets -inf if
            eps is 0 and tau positive, which takes it out of a softmax.
        tau: the strength, of either sign. With 0 and no power all biases are 0.
        eps: at least 0; the published constants are 1e-9 (SADE, BalPoE, MDCS) and 1e-12 (logit adjustment).
        kind: see above.
        power: see above; logit adjustment and MDCS have it so.

    Returns:
        float64 [C], on the device of ``class_counts``.

    Raises:
        TypeError, ValueError: an argument is unusable.

    Source: Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021; Zhang et al., SADE, NeurIPS 2022.
    """
    counts = _checked_counts("class_bias", class_counts, least=0)
    tau, eps = check_finite("class_bias", tau=tau, eps=eps)
    if eps < 0:
        raise ValueError(f"class_bias: eps must be at least 0, got {eps}")
    if kind not in KINDS:
        raise ValueError(f"class_bias: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    x = counts if kind == "counts" else counts / counts.sum()
    if kind == "reverse":
        ascending = counts.argsort(stable=True)
        x = torch.empty_like(x).scatter_(0, ascending, x[ascending].flip(0))
    if power:
        return (x**tau + eps).log()
    return torch.special.xlogy(x.new_full((), tau), x + eps)


def class_margin(class_counts: Counts, largest: float = 0.5) -> Tensor:
    """Compute LDAM's margins, m[c] = largest n[c]^(-1/4) / max_j n[j]^(-1/4).

    Args:
        class_counts: n, [C], training images of each class, at least 1.
        largest: the margin of the rarest class, at least 0.

    Returns:
        float64 [C], on the device of ``class_counts``.

    Raises:
        TypeError, ValueError: an argument is unusable.

    Source: Cao et al., LDAM, NeurIPS 2019, equation 13.
    """
    counts = _checked_counts("class_margin", class_counts, least=1)
    (largest,) = check_finite("class_margin", largest=largest)
    if largest < 0:
        raise ValueError(f"class_margin: largest must be at least 0, got {largest}")
    root = counts**-0.25
    return largest * root / root.max()


def class_weight(class_counts: Counts, beta: float = 0.9999) -> Tensor:
    """Compute weights by the effective number of images, w[c] = (1 - beta) / (1 - beta^n[c]), scaled to the sum C.

    Args:
        class_counts: n, [C], training images of each class, at least 1.
        beta: in [0, 1); 0 gives equal weights.

    Returns:
        float64 [C], on the device of ``class_counts``.

    Raises:
        TypeError, ValueError: an argument is unusable.

    Source: Cui et al., "Class-Balanced Loss", CVPR 2019, section 3.
    """
    counts = _checked_counts("class_weight", class_counts, least=1)
    (beta,) = check_finite("class_weight", beta=beta)
    if not 0 <= beta < 1:
        raise ValueError(f"class_weight: beta must lie in [0, 1), got {beta}")
    weight = (1 - beta) / (1 - beta**counts)
    return weight * (len(counts) / weight.sum())


def hardest_classes(logits: Tensor, target: Tensor, count: int) -> Tensor:
    """Find the label of each row and the count - 1 other classes with the largest logits, of equal ones the lowest.

    Args:
        logits: float16, bfloat16, float32 or float64 [B, C]; any strides.
        target: int64 [B], in 0..C-1.
        count: from 1 to C.

    Returns:
        bool [B, C], without gradient: ``class_mask`` of :func:`~shike_fast.ops.expert_loss`.

    Raises:
        TypeError, ValueError: an argument is unusable.
        IndexError: a target out of range (CPU, eager).

    Source: Li et al., NCL, CVPR 2022, section 3.3 (hard category mining).
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = describe(logits) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"hardest_classes: logits must be a tensor [B, C], got {got}")
    _, shape = check_logits("hardest_classes", logits.unsqueeze(0))
    check_target("hardest_classes", target, logits, shape)
    classes = shape[2]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= classes:
        raise ValueError(f"hardest_classes: count must be a whole number from 1 to C={classes}, got {count!r}")
    label = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(1, target.unsqueeze(1), True)
    if count == 1 or len(logits) == 0:
        return label
    others = logits.detach().masked_fill(label, -torch.inf)
    least = others.topk(count - 1, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = others > least, (others == least) & ~label
    free = count - 1 - above.sum(1, keepdim=True)  # places for classes that are as hard as the last one
    return label | above | (equal & (equal.cumsum(1, dtype=torch.int32) <= free))


def _checked_counts(op: str, class_counts: Counts, least: int) -> Tensor:
    """float64 [C]"""
    counts = as_tensor(class_counts, torch.device("cpu"))
    if not isinstance(counts, Tensor):
        raise TypeError(
            f"{op}: class_counts must be a tensor, list or array of numbers [C], got {type(class_counts).__name__}"
        )
    check_dense(op, "class_counts", counts)
    if counts.dtype not in FLOAT_DTYPES and counts.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{op}: class_counts must be floating point or integer [C], got {describe(counts)}")
    if counts.dim() != 1 or len(counts) < 2:
        raise ValueError(f"{op}: class_counts must be [C] with C >= 2, got {describe(counts)}")
    counts = counts.detach().to(torch.float64)
    if values_are_readable(counts) and not bool((counts >= least).all()):
        first = int((~(counts >= least)).nonzero()[0])
        raise ValueError(f"{op}: class_counts must be at least {least}, class {first} has {float(counts[first]):g}")
    return counts
