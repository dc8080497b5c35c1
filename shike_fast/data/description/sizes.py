"""How unequal the classes are in size, as figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from shike_fast.data.shots import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, SHOTS


@dataclass(frozen=True)
class ClassSizes:
    """The sizes of the classes that have training images.

    Attributes:
        largest, median, smallest: images of a class.
        imbalance_factor: largest / smallest.
        gini: :func:`gini`, 0 where all classes are of one size.
        effective_classes: :func:`effective_classes`, C where all are of one size.
        head_classes: number of the largest classes that are a tenth of them, rounded up.
        head_share: their share of the images, 0 … 1.
    """

    largest: int
    median: float
    smallest: int
    imbalance_factor: float
    gini: float
    effective_classes: float
    head_classes: int
    head_share: float

    @classmethod
    def of(cls, counts: Sequence[int]) -> ClassSizes:
        """The figures of some class counts, of which at least one is positive; classes without images do not count."""
        sizes = sorted((count for count in counts if count > 0), reverse=True)
        head = -(-len(sizes) // 10)
        return cls(
            largest=sizes[0],
            median=statistics.median(sizes),
            smallest=sizes[-1],
            imbalance_factor=sizes[0] / sizes[-1],
            gini=gini(sizes),
            effective_classes=effective_classes(sizes),
            head_classes=head,
            head_share=sum(sizes[:head]) / sum(sizes),
        )


def gini(sizes: Sequence[int]) -> float:
    """The Gini coefficient of class sizes, 0 (all equal) … 1 − 1/C (one class has all).

    G = Σ_i Σ_j |n_i − n_j| / (2 C Σ_i n_i) = 2 Σ_i i n_(i) / (C Σ_i n_i) − (C + 1) / C with n_(1) ≤ … ≤ n_(C).

    Source: Yang et al., "A Survey on Long-Tailed Visual Recognition", IJCV 2022, which proposes it as the measure of
    how long-tailed a data set is.

    Args:
        sizes: n, positive, in any order.
    """
    ranked = sum(rank * size for rank, size in enumerate(sorted(sizes), start=1))
    return (2 * ranked - (len(sizes) + 1) * sum(sizes)) / (len(sizes) * sum(sizes))


def effective_classes(sizes: Sequence[int]) -> float:
    """The number of classes of one size that would have the entropy of these: exp(−Σ π_c log π_c), π = n / Σ n.

    Source: Hill, "Diversity and Evenness", Ecology 1973: the number of order 1.

    Args:
        sizes: n, positive.
    """
    total = sum(sizes)
    return math.exp(-sum(size / total * math.log(size / total) for size in sizes))


@dataclass(frozen=True)
class ShotBands:
    """Thresholds of many-, medium- and few-shot classes.

    Attributes:
        many_above: a class with more training images is many-shot.
        few_below: one with fewer is few-shot.
    """

    many_above: int = MANY_SHOT_ABOVE
    few_below: int = FEW_SHOT_BELOW

    def shot(self, size: int) -> str:
        """The shot of a class with so many training images."""
        return "many" if size > self.many_above else "few" if size < self.few_below else "medium"

    def classes(self, counts: Sequence[int]) -> dict[str, int]:
        """How many classes with training images are of each shot."""
        shots = [self.shot(count) for count in counts if count > 0]
        return {shot: shots.count(shot) for shot in SHOTS}


def suggest_bands(counts: Sequence[int]) -> ShotBands | None:
    """Thresholds by terciles of the classes, where the field's put all classes in one band; None where none is needed.

    A third of the classes, rounded, is many-shot and a third few-shot; of classes of one size at a border, all are
    medium-shot. Where all classes are of one size there is nothing to tell apart.

    Args:
        counts: training images of each class; classes without any do not count.
    """
    sizes = sorted((count for count in counts if count > 0), reverse=True)
    third = round(len(sizes) / 3)
    if len(sizes) not in ShotBands().classes(sizes).values() or third == 0 or sizes[0] == sizes[-1]:
        return None
    bands = ShotBands(many_above=sizes[third], few_below=sizes[-third - 1])
    return bands if len(sizes) not in bands.classes(sizes).values() else None
