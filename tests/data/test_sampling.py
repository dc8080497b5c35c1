"""What the samplers draw: exactly, where that is fixed, else by chi-square."""

import time

import numpy as np
import pytest

from shike_fast.data import SAMPLERS, make_sampler
from shike_fast.data.random import permutation
from shike_fast.data.sampling import SAMPLES_A_VISIT, count_repeats

COUNTS = np.array([400, 150, 60, 0, 23, 9, 3, 1])  # of each class; one has no images
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
THERE = np.flatnonzero(COUNTS)


def draws(name, epochs=1, **stage):
    """The images that some epochs draw, [epochs, N]."""
    sampler = make_sampler(name, LABELS, **stage)
    return np.stack([sampler.order(5, epoch) for epoch in range(epochs)])


def chi_square(observed, probabilities):
    expected = probabilities * observed.sum()
    return ((observed - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_form_of_an_order(name):
    sampler = make_sampler(name, LABELS, epochs=4)
    order = sampler.order(1, 2)
    assert (order.dtype, order.shape) == (np.int64, LABELS.shape)
    assert order.min() >= 0 and order.max() < len(LABELS)
    np.testing.assert_array_equal(make_sampler(name, LABELS, epochs=4).order(1, 2), order)
    assert (sampler.order(1, 3) != order).any() and (sampler.order(2, 2) != order).any()
    assert sampler.repeats == bool(count_repeats(order).any())


def test_instance_is_the_order_of_before():
    np.testing.assert_array_equal(make_sampler("instance", LABELS).order(3, 7), permutation(3, 7, len(LABELS)))


def test_class_aware_visits_all_classes_before_any_again():
    (order,) = draws("class-aware")
    visits = LABELS[order][: len(order) // SAMPLES_A_VISIT * SAMPLES_A_VISIT].reshape(-1, SAMPLES_A_VISIT)
    assert (visits == visits[:, :1]).all()
    rounds = visits[: len(visits) // len(THERE) * len(THERE), 0].reshape(-1, len(THERE))
    assert len(rounds) == 23
    assert (np.sort(rounds, axis=1) == THERE).all()
    assert len(set(map(tuple, rounds))) == len(rounds)  # each time in a new order
    shares = np.bincount(LABELS[order], minlength=len(COUNTS))
    assert shares[COUNTS == 0] == 0
    assert shares[THERE].max() - shares[THERE].min() <= SAMPLES_A_VISIT


def test_class_aware_uses_a_list_up_before_it_is_shuffled_anew():
    (order,) = draws("class-aware")
    for label in THERE:
        drawn = order[LABELS[order] == label]
        count = COUNTS[label]
        lists = [drawn[start : start + count] for start in range(0, len(drawn), count)]
        assert all(len(set(images)) == len(images) for images in lists)
        whole = [tuple(images) for images in lists if len(images) == count]
        if count >= 9:
            assert len(set(whole)) == len(whole)  # another order each time
        repeats = count_repeats(order)[LABELS[order] == label]
        np.testing.assert_array_equal(repeats, np.arange(len(drawn)) // count)


def test_class_aware_draws_the_images_of_a_class_equally_often():
    epochs = draws("class-aware", epochs=400)
    for label in (0, 1):  # whose lists no epoch uses up
        shown = np.bincount(epochs.ravel(), minlength=len(LABELS))[label == LABELS]
        assert chi_square(shown, np.full(len(shown), 1 / len(shown))) < len(shown) + 4 * (2 * len(shown)) ** 0.5


def test_any_class_may_come_first():
    sampler = make_sampler("class-aware", LABELS)
    first = LABELS[[sampler.order(0, epoch)[0] for epoch in range(1400)]]
    assert chi_square(np.bincount(first, minlength=len(COUNTS))[THERE], np.full(7, 1 / 7)) < 22.5  # 6 degrees, 0.001


def test_an_epoch_too_short_for_all_classes():
    order = make_sampler("class-aware", np.array([0, 1, 2, 2, 5])).order(0, 0)
    assert len(order) == 5 and len(set(order[:4])) <= 2  # one visit, and the first image of another


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_progressive_goes_from_the_sizes_to_equal_shares(t):
    stage = {"first_epoch": 10, "epochs": 5}
    expected = (1 - t) * COUNTS / COUNTS.sum() + t * (COUNTS > 0) / len(THERE)
    sampler = make_sampler("progressive", LABELS, **stage)
    np.testing.assert_allclose(sampler.probabilities(10 + round(4 * t)), expected[THERE], rtol=1e-12)
    drawn = np.concatenate([sampler.order(seed, 10 + round(4 * t)) for seed in range(40)])
    assert chi_square(np.bincount(LABELS[drawn], minlength=len(COUNTS))[THERE], expected[THERE]) < 22.5
    assert not set(np.flatnonzero(COUNTS == 0)) & set(LABELS[drawn])


def test_progressive_in_a_stage_of_one_epoch_and_outside_of_it():
    sampler = make_sampler("progressive", LABELS, first_epoch=3, epochs=1)
    for epoch in (0, 3):
        np.testing.assert_allclose(sampler.probabilities(epoch), COUNTS[THERE] / COUNTS.sum())
    late = make_sampler("progressive", LABELS, epochs=2).probabilities(9)
    np.testing.assert_allclose(late, 1 / len(THERE))


def test_square_root():
    drawn = draws("square-root", epochs=40).ravel()
    expected = np.sqrt(COUNTS[THERE]) / np.sqrt(COUNTS[THERE]).sum()
    assert chi_square(np.bincount(LABELS[drawn], minlength=len(COUNTS))[THERE], expected) < 22.5
    within = np.bincount(drawn, minlength=len(LABELS))[LABELS == 2]
    assert chi_square(within, np.full(60, 1 / 60)) < 98.3  # 59 degrees, 0.001


def test_repeats_count_what_stood_before():
    assert count_repeats(np.array([4, 4, 0, 4, 0, 7])).tolist() == [0, 1, 0, 2, 1, 0]
    assert count_repeats(np.arange(0)).tolist() == []
    order = draws("square-root")[0]
    expected = [list(order[:place]).count(image) for place, image in enumerate(order)]
    assert count_repeats(order).tolist() == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_of_inaturalists_size_takes_less_than_a_second(name):
    counts = np.maximum(2, 1000 * 500.0 ** -(np.arange(8142) / 8141) * 0.335).astype(int)
    labels = np.repeat(np.arange(8142), counts)
    labels = np.concatenate([labels, np.zeros(437_513 - len(labels), np.int64)])
    sampler = make_sampler(name, labels, epochs=3)
    seconds = []
    for _ in range(3):  # another process may be busy
        started = time.process_time()
        count_repeats(sampler.order(0, 1))
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1


def test_unusable_samplers():
    with pytest.raises(ValueError, match=r"unknown sampler 'cyclic'; choose one of instance, class-aware, squ"):
        make_sampler("cyclic", LABELS)
    for name in SAMPLERS:
        if name != "instance":
            with pytest.raises(ValueError, match=f"sampler '{name}' needs at least one image"):
                make_sampler(name, np.arange(0))
    assert len(make_sampler("instance", np.arange(0)).order(0, 0)) == 0
