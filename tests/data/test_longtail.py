import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest

from shike_fast.data import load_dataset, long_tail_counts
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


def test_a_step():
    assert long_tail_counts(500, 10, 100, "step").tolist() == [500] * 5 + [5] * 5
    assert long_tail_counts(9, 5, 2, "step").tolist() == [9, 9, 9, 4, 4]
    assert long_tail_counts(7, 1, 100, "step").tolist() == [7]
    labels = np.repeat(np.arange(4), 6)
    assert np.bincount(labels[long_tail_indices(labels, 4, 3, "ldam", "step")]).tolist() == [6, 6, 2, 2]


def test_a_profile_that_is_none(data_error):
    with data_error("long_tail must be one of exp, step, got 'linear'"):
        long_tail_counts(7, 4, 1, "linear")
    with data_error("imagefolder: long_tail 'step' needs an imbalance factor"):
        load_dataset("imagefolder", long_tail="step")


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


def checksum(numbers):
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()


def test_the_ldam_subset_is_that_of_its_code():
    """Its way written out: one global stream, a shuffle of each class's indices in turn."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 30))
    np.random.seed(0)
    expected = []
    for label, count in enumerate(long_tail_counts(30, 10, 10)):
        members = np.flatnonzero(labels == label)
        np.random.shuffle(members)
        expected += members[:count].tolist()
    assert long_tail_indices(labels, 10, 10, "ldam").tolist() == expected


CIFAR100_LABELS = "8bf4935e7c77a3096270043c6f3b221b6ecb9c63d1a08608e9af66cff17e977a"
CIFAR100_INDICES = {  # of the first n_c images of a class, and of those that the published code of LDAM and RIDE takes
    (10, "first"): "84a5c3b31685b50f",
    (10, "ldam"): "b4fbf1bf0a7f3338",
    (50, "first"): "4815ebc1a72d307c",
    (50, "ldam"): "561fa940cc7d3551",
    (100, "first"): "ccbdac63c9f8cfc0",
    (100, "ldam"): "e0d58a4d2700c460",
}


@pytest.mark.skipif("CIFAR100_DIR" not in os.environ, reason="CIFAR100_DIR names no folder with the official CIFAR-100")
@pytest.mark.parametrize(("factor", "subset"), CIFAR100_INDICES)
def test_subsets_of_the_real_label_file(factor, subset):
    labels = np.fromfile(Path(os.environ["CIFAR100_DIR"]) / "cifar-100-binary" / "train.bin", np.uint8).reshape(
        -1, 3074
    )[:, 1]
    assert checksum(labels) == CIFAR100_LABELS
    kept = long_tail_indices(labels.astype(np.int64), 100, factor, subset)
    assert checksum(kept)[:16] == CIFAR100_INDICES[factor, subset]


@pytest.mark.parametrize(
    ("factor", "expected"), [(10, "3950dc0679f02be3"), (50, "e5ac61a960102294"), (100, "b56cfff7465dadc1")]
)
def test_ldam_ranks_of_cifar100(factor, expected):
    """The shuffles depend on the sizes of the classes alone, which a file sorted by class has as well."""
    kept = long_tail_indices(np.repeat(np.arange(100), 500), 100, factor, "ldam")
    assert checksum(kept)[:16] == expected


def test_an_unknown_subset(data_error):
    with data_error("subset must be one of first, ldam, got 'last'"):
        long_tail_indices(np.array([0, 1]), 2, 1, "last")


def test_a_data_set_that_is_used_whole_has_no_subset(data_error, tmp_path):
    with data_error("imagefolder: subset 'ldam' needs an imbalance factor"):
        load_dataset("imagefolder", data_dir=tmp_path, subset="ldam")


def test_a_data_set_takes_the_subset_that_it_is_asked_for():
    first, ldam = (load_dataset("digits-lt", subset=subset) for subset in ("first", "ldam"))
    assert first.class_counts.tolist() == ldam.class_counts.tolist()
    assert first.fingerprint != ldam.fingerprint
