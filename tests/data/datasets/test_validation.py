import numpy as np
import pytest

from shike_fast.data.datasets.validation import SplitOptions, choose, set_aside

NAMES = [f"{i:03d}.jpg".encode() for i in range(111)]
LABELS = np.repeat([0, 1, 2, 3], [100, 8, 2, 1])


@pytest.mark.parametrize(("share", "counts"), [(0.1, [10, 1, 1, 0]), (0.25, [25, 2, 1, 0]), (0.99, [99, 7, 1, 0])])
def test_how_many_of_each_class(share, counts):
    left, aside = choose(LABELS, NAMES, share, 0)
    assert np.bincount(LABELS[aside], minlength=4).tolist() == counts
    assert sorted([*left, *aside]) == list(range(111))
    assert (np.diff(left) > 0).all() and (np.diff(aside) > 0).all()


def test_the_order_of_the_files_does_not_matter():
    expected = {NAMES[i] for i in choose(LABELS, NAMES, 0.2, 0)[1]}
    order = np.random.default_rng(0).permutation(111)
    shuffled = [NAMES[i] for i in order]
    assert {shuffled[i] for i in choose(LABELS[order], shuffled, 0.2, 0)[1]} == expected
    assert {NAMES[i] for i in choose(LABELS, NAMES, 0.2, 1)[1]} != expected


def test_other_images_change_no_choice_but_the_number():
    """An image that is added moves at most one other from one side to the other."""
    before = {NAMES[i] for i in choose(LABELS[:100], NAMES[:100], 0.1, 0)[1]}
    after = choose(np.zeros(101, np.int64), [*NAMES[:100], b"new.jpg"], 0.1, 0)[1]
    assert len(before - {NAMES[i] for i in after if i < 100}) <= 1


def test_equal_names_are_chosen_in_their_order():
    assert choose(np.zeros(4, np.int64), [b"x"] * 4, 0.5, 0)[1].tolist() == [0, 1]


def test_what_is_recorded():
    left, aside, split = set_aside(LABELS, NAMES, SplitOptions(val_share=0.5, split_seed=3), "here")
    assert (split.share, split.seed, split.whole) == (0.5, 3, 111)
    assert split.names == tuple(NAMES[i] for i in aside)
    assert len(left) + len(aside) == 111


def test_classes_of_one_image(data_error):
    with data_error("here: has no validation images, and none can be set aside, for no class has two images"):
        set_aside(np.arange(3), NAMES[:3], SplitOptions(), "here")
