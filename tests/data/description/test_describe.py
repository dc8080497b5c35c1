"""The description in Python: classes, names, advice, and what is no data set."""

import dataclasses

import pytest
from described import Samples, made, of_sizes

from shike_fast import data
from shike_fast.errors import DataError


def test_classes_on_one_side_and_without_images():
    description = of_sizes([3, 0, 2, 0], [1, 1, 0, 0], ["a", "b", "c", "d"])
    assert (description.training_only, description.test_only, description.absent) == ((2,), (1,), (3,))
    assert description.findings["one-sided"] == 3
    assert (description.sizes.smallest, description.sizes.imbalance_factor) == (2, 1.5)
    assert description.train_counts == (3, 0, 2, 0) and description.by_size == [0, 2, 1, 3]
    assert description.findings["leakage"] is None and description.unnamed is None


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["Sea lion", "sealion", "SEA  LION ", "seal"], ((0, 1, 2),)),
        (["caf\u00e9", "cafe\u0301", "cafe"], ((0, 1),)),
        (["crane", "cat", "crane"], ((0, 2),)),
        (["a", "b", "c"], ()),
    ],
)
def test_similar_names(names, groups):
    assert of_sizes([2] * len(names), names=names).similar_names == groups


def test_advice_follows_the_figures():
    def said(*arguments):
        return " ".join(of_sizes(*arguments).advice)

    assert "about one size" in said([60, 50, 40]) and "fewer than 5" not in said([60, 50, 40])
    assert "Mildly imbalanced" in said([60, 50, 30])
    assert "Long-tailed" in said([60, 50, 6]) and "one class" not in said([60, 50, 6])
    assert "1 class has fewer than 5 training images" in said([60, 50, 4])
    assert said([60]).startswith("There is one class")
    assert "differ in size" in said([60, 50], [40, 20]) and "differ in size" not in said([60, 50], [40, 21])
    assert "smallest test class has 1 image: one image is 100 points" in said([60, 50], [1, 1])
    assert "test class" not in said([60, 50], [10, 10]) + said([60, 50], [0, 0])


def test_bad_labels_and_no_images():
    with pytest.raises(DataError, match="mine: training label 2 is outside 0 … 1"):
        data.describe(_with_labels([0, 2], [0]))
    with pytest.raises(DataError, match="mine: test label -1 is outside 0 … 1"):
        data.describe(_with_labels([0, 1], [-1]))
    with pytest.raises(DataError, match="mine: there are no training images"):
        data.describe(_with_labels([], [0]))


def _with_labels(train, test):
    return dataclasses.replace(made([0], [0], ["a", "b"]), train=Samples(train), test=Samples(test))
