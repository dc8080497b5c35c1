"""The long-tail subset of a data set: classes that shrink exponentially, or in one step.

Published code agrees on how many images of each class are kept, not on which: :data:`SUBSETS`.
"""

import math

import numpy as np
from numpy.typing import NDArray

from shike_fast.errors import DataError

SUBSETS = {
    "first": "the first images of each class in file order (SHIKE, LOS)",
    "ldam": "the first of each class shuffled after numpy.random.seed(0) (LDAM, RIDE, SADE, BalPoE, PaCo, ResLT, MDCS)",
}
"""Ways to choose the images of a long-tail subset, and whose code does it so."""

PROFILES = {
    "exp": 'n_c = int(M · (1/IF)^(c/(C−1))) (Cui et al., "Class-Balanced Loss", CVPR 2019)',
    "step": "n_c = M in the first half of the classes, int(M/IF) in the last (Buda et al., 2018; LDAM, NeurIPS 2019)",
}
"""How the sizes of the classes fall, by class id."""


def check_subset(subset: str) -> str:
    """Return the name, or raise DataError unless it is one of :data:`SUBSETS`."""
    if subset not in SUBSETS:
        raise DataError(f"subset must be one of {', '.join(SUBSETS)}, got {subset!r}")
    return subset


def check_profile(profile: str) -> str:
    """Return the name, or raise DataError unless it is one of :data:`PROFILES`."""
    if profile not in PROFILES:
        raise DataError(f"long_tail must be one of {', '.join(PROFILES)}, got {profile!r}")
    return profile


def check_imbalance_factor(imbalance_factor: float) -> float:
    """Return the factor as a float, or raise DataError unless it is a finite number of at least 1."""
    if isinstance(imbalance_factor, bool) or not isinstance(imbalance_factor, int | float):
        raise DataError(f"imbalance_factor must be a number, got {imbalance_factor!r}")
    if not math.isfinite(imbalance_factor) or imbalance_factor < 1:
        raise DataError(f"imbalance_factor must be finite and at least 1 (1 = balanced), got {imbalance_factor}")
    return float(imbalance_factor)


def long_tail_counts(
    largest: int, num_classes: int, imbalance_factor: float, profile: str = "exp"
) -> NDArray[np.int64]:
    """Images kept of each class: n_c = int(M · (1/IF)^(c/(C−1))), or in one step: M for c < C/2, else int(M/IF).

    Args:
        largest: M, the number of images of the largest class.
        num_classes: C. Of an odd number, the class in the middle is one of the large ones.
        imbalance_factor: IF, the ratio between the first class and the last one; 1 keeps every class at M.
        profile: a key of :data:`PROFILES`.

    Returns:
        int64 [C], decreasing in class-id order.

    Raises:
        DataError: the factor is below 1 or not finite, or so large that a class would be left without images.
    """
    factor = check_imbalance_factor(imbalance_factor)
    if check_profile(profile) == "step":
        small = num_classes // 2
        counts = [largest] * (num_classes - small) + [int(largest / factor)] * small
    else:
        # A single class has no tail; max() keeps the exponent of the formula defined.
        counts = [int(largest * (1 / factor) ** (c / max(num_classes - 1.0, 1.0))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise DataError(
            f"imbalance_factor {imbalance_factor:g} leaves class {counts.index(0)} without training images; "
            f"the largest class has {largest}, so use at most {largest}"
        )
    return np.array(counts, dtype=np.int64)


def long_tail_indices(
    labels: NDArray[np.int64],
    num_classes: int,
    imbalance_factor: float,
    subset: str = "first",
    profile: str = "exp",
) -> NDArray[np.int64]:
    """Indices of the long-tail subset: n_c images of each class, class after class.

    A class that holds fewer than its n_c images (a set that was not balanced) gives all it has.

    Args:
        labels: int64 [N], each in 0 … C−1.
        num_classes: C.
        imbalance_factor: IF of :func:`long_tail_counts`.
        subset: which images of a class, a key of :data:`SUBSETS`.
        profile: how the classes shrink, a key of :data:`PROFILES`.
    """
    check_subset(subset)
    present = np.bincount(labels, minlength=num_classes)
    counts = long_tail_counts(int(present.max()), num_classes, imbalance_factor, profile)
    grouped = np.argsort(labels, kind="stable")  # stable: file order within a class
    classes = np.split(grouped, np.cumsum(present)[:-1])
    if subset == "ldam":
        # The global generator of that code after its seed(0); NumPy promises this stream for all time.
        random = np.random.RandomState(0)
        for members in classes:
            random.shuffle(members)
    return np.concatenate([members[:n] for members, n in zip(classes, counts, strict=True)]).astype(np.int64)
