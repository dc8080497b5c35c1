"""The figures of class sizes, against closed forms and definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shike_fast.data.description.sizes import ClassSizes, ShotBands, effective_classes, gini, suggest_bands
from shike_fast.data.shots import shot_names

sizes_of_classes = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@pytest.mark.parametrize("classes", [1, 2, 7, 100])
def test_gini_in_closed_form(classes):
    assert gini([9] * classes) == 0
    assert gini(range(1, classes + 1)) == pytest.approx((classes - 1) / (3 * classes))
    one_has_all = [10**12] + [1] * (classes - 1)
    assert gini(one_has_all) == pytest.approx(1 - 1 / classes, abs=1e-9)


@given(sizes_of_classes)
def test_gini_by_its_definition(sizes):
    differences = sum(abs(a - b) for a, b in itertools.product(sizes, sizes))
    assert gini(sizes) == pytest.approx(differences / (2 * len(sizes) * sum(sizes)), abs=1e-12)
    assert gini(sizes) == pytest.approx(gini([3 * size for size in sizes]), abs=1e-12)


@given(sizes_of_classes)
def test_effective_classes_are_between_one_and_all(sizes):
    assert 1 - 1e-9 <= effective_classes(sizes) <= len(sizes) + 1e-9
    assert effective_classes([4] * len(sizes)) == pytest.approx(len(sizes))
    shares = np.array(sizes) / sum(sizes)
    assert effective_classes(sizes) == pytest.approx(np.prod(shares**-shares))


def test_figures_of_known_classes():
    sizes = ClassSizes.of([0, 30, 1, 5, 0, 4])
    assert (sizes.largest, sizes.median, sizes.smallest, sizes.imbalance_factor) == (30, 4.5, 1, 30)
    assert (sizes.head_classes, sizes.head_share) == (1, 0.75)
    assert sizes.gini == pytest.approx(2 * (1 * 1 + 2 * 4 + 3 * 5 + 4 * 30) / (4 * 40) - 5 / 4)
    assert ClassSizes.of([2] * 21).head_classes == 3  # a tenth, rounded up


@given(sizes_of_classes)
def test_bands_are_the_shots_of_the_field(sizes):
    names = shot_names(np.array(sizes))
    assert [ShotBands().shot(size) for size in sizes] == names
    assert ShotBands().classes([0, *sizes]) == {shot: names.count(shot) for shot in ("many", "medium", "few")}


def test_bands_by_thirds_where_the_thresholds_part_nothing():
    few = suggest_bands([0, 19, 12, 11, 7, 5, 1])
    assert few == ShotBands(many_above=11, few_below=7)
    assert few.classes([0, 19, 12, 11, 7, 5, 1]) == {"many": 2, "medium": 2, "few": 2}
    many = suggest_bands([900, 800, 700, 600, 500, 400, 300])
    assert many.classes([900, 800, 700, 600, 500, 400, 300]) == {"many": 2, "medium": 3, "few": 2}
    assert suggest_bands([50, 40, 30]) == ShotBands(many_above=40, few_below=40)


@pytest.mark.parametrize(
    "counts",
    [[101, 5], [5], [5, 5, 5, 5], [500, 500, 500], [19, 20], [5, 5, 5, 1, 1, 1]],
    ids=["parted", "one class", "one size", "one large size", "border", "two sizes"],
)
def test_no_other_bands_where_none_help(counts):
    assert suggest_bands(counts) is None


@given(st.lists(st.integers(1, 19), min_size=2, max_size=40))
def test_other_bands_part_the_classes(sizes):
    bands = suggest_bands(sizes)
    if bands is not None:
        parted = bands.classes(sizes)
        assert sum(parted.values()) == len(sizes) and max(parted.values()) < len(sizes)
        ordered = [bands.shot(size) for size in sorted(sizes, reverse=True)]
        assert ordered == sorted(ordered, key=["many", "medium", "few"].index)
