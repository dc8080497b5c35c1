"""The exponential long-tail subset of a balanced data set (Cui et al., "Class-Balanced Loss", CVPR 2019)."""

import math

import numpy as np
from numpy.typing import NDArray

from shike_fast.errors import DataError


def check_imbalance_factor(imbalance_factor: float) -> float:
    """Return the factor as a float, or raise DataError unless it is a finite number of at least 1."""
    if isinstance(imbalance_factor, bool) or not isinstance(imbalance_factor, int | float):
        raise DataError(f"imbalance_factor must be a number, got {imbalance_factor!r}")
    if not math.isfinite(imbalance_factor) or imbalance_factor < 1:
        raise DataError(f"imbalance_factor must be finite and at least 1 (1 = balanced), got {imbalance_factor}")
    return float(imbalance_factor)


def long_tail_counts(largest: int, num_classes: int, imbalance_factor: float) -> NDArray[np.int64]:
    """Images kept of each class: n_c = int(M · (1/IF)^(c/(C−1))).

    Args:
        largest: M, the number of images of the largest class.
        num_classes: C.
        imbalance_factor: IF, the ratio between the first class and the last one; 1 keeps every class at M.

    Returns:
        int64 [C], decreasing in class-id order.

    Raises:
        DataError: the factor is below 1 or not finite, or so large that a class would be left without images.
    """
    factor = check_imbalance_factor(imbalance_factor)
    # A single class has no tail; max() keeps the exponent of the formula defined.
    counts = [int(largest * (1 / factor) ** (c / max(num_classes - 1.0, 1.0))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise DataError(
            f"imbalance_factor {imbalance_factor:g} leaves class {counts.index(0)} without training images; "
            f"the largest class has {largest}, so use at most {largest}"
        )
    return np.array(counts, dtype=np.int64)


def long_tail_indices(labels: NDArray[np.int64], num_classes: int, imbalance_factor: float) -> NDArray[np.int64]:
    """Indices of the long-tail subset: the first n_c images of each class in file order, class after class.

    A class that holds fewer than its n_c images (a set that was not balanced) gives all it has.
    """
    present = np.bincount(labels, minlength=num_classes)
    counts = long_tail_counts(int(present.max()), num_classes, imbalance_factor)
    grouped = np.argsort(labels, kind="stable")  # stable: file order within a class
    starts = np.concatenate(([0], np.cumsum(present)[:-1]))
    return np.concatenate([grouped[s : s + min(n, m)] for s, n, m in zip(starts, counts, present, strict=True)]).astype(
        np.int64
    )
