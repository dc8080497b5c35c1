import math

import numpy as np
import pytest

from shike_fast.data import long_tail_counts
from shike_fast.data.longtail import check_imbalance_factor, long_tail_indices


@pytest.mark.parametrize(
    ("largest", "classes", "factor", "total", "smallest"),
    [
        (5000, 10, 10, 20_431, 500),
        (5000, 10, 50, 13_996, 100),
        (5000, 10, 100, 12_406, 50),
        (500, 100, 10, 19_573, 50),
        (500, 100, 50, 12_608, 10),
        (500, 100, 100, 10_847, 5),
    ],
)
def test_published_totals(largest, classes, factor, total, smallest):
    counts = long_tail_counts(largest, classes, factor)
    assert counts.dtype == np.int64
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (largest, smallest)
    assert (np.diff(counts) <= 0).all()


def test_cifar100_shots_at_factor_100():
    counts = long_tail_counts(500, 100, 100)
    assert ((counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()) == (35, 35, 30)


def test_factor_one_is_balanced():
    assert long_tail_counts(7, 4, 1).tolist() == [7, 7, 7, 7]


def test_a_single_class_keeps_all_images():
    assert long_tail_counts(7, 1, 100).tolist() == [7]


@pytest.mark.parametrize("factor", [0.5, 0, -3, math.inf, math.nan])
def test_factors_below_one_or_not_finite(factor, data_error):
    with data_error("imbalance_factor must be finite and at least 1", factor):
        long_tail_counts(500, 10, factor)


@pytest.mark.parametrize("factor", ["100", True, None])
def test_factors_that_are_no_numbers(factor, data_error):
    with data_error("imbalance_factor must be a number", repr(factor)):
        check_imbalance_factor(factor)


def test_a_factor_that_empties_the_last_class(data_error):
    with data_error("imbalance_factor 600 leaves class 9 without", "use at most 500"):
        long_tail_counts(500, 10, 600)


def test_the_first_images_of_each_class_are_kept_in_file_order():
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 1, 2, 0, 1, 2])  # four of each
    kept = long_tail_indices(labels, 3, 4)  # counts 4, 2, 1
    assert kept.tolist() == [1, 3, 6, 9, 2, 5, 0]


def test_the_largest_class_sets_the_scale_and_a_smaller_one_gives_all_it_has():
    labels = np.array([0] * 3 + [1] * 8 + [2] * 8)  # counts of the formula: 8, 5, 4
    kept = long_tail_indices(labels, 3, 2)
    assert np.bincount(labels[kept]).tolist() == [3, 5, 4]
