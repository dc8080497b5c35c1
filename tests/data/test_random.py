import numpy as np
import pytest

from shike_fast.data.random import (
    STREAM_AUGMENTATION,
    STREAM_ORDER,
    check_seed,
    draw_words,
    integers,
    permutation,
    philox,
    uniform,
)

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers published with Random123 for philox4x32-10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert words.dtype == np.uint32
    assert tuple(words[0]) == expected


def test_a_row_depends_on_seed_epoch_and_index_alone():
    whole = draw_words(3, 7, np.arange(100), 10, STREAM_AUGMENTATION)
    assert whole.shape == (100, 10)
    some = np.array([41, 5, 99, 5])
    np.testing.assert_array_equal(draw_words(3, 7, some, 10, STREAM_AUGMENTATION), whole[some])
    np.testing.assert_array_equal(draw_words(3, 7, some, 6, STREAM_AUGMENTATION), whole[some, :6])


def test_every_part_of_the_key_changes_the_draws():
    def draw(seed=1, epoch=2, index=3, stream=STREAM_AUGMENTATION):
        return tuple(draw_words(seed, epoch, np.array([index]), 4, stream)[0])

    variants = [draw(), draw(seed=2), draw(seed=1 + 2**32), draw(epoch=3), draw(index=4), draw(stream=STREAM_ORDER)]
    assert len(set(variants)) == len(variants)


def test_no_words_are_an_empty_row():
    assert draw_words(0, 0, np.arange(3), 0, STREAM_AUGMENTATION).shape == (3, 0)


def test_uniform_covers_the_half_open_unit_interval():
    assert uniform(np.array([0, 2**31, FULL], dtype=np.uint32)).tolist() == [0.0, 0.5, 1 - 2**-32]
    draws = uniform(draw_words(0, 0, np.arange(10_000), 4, STREAM_AUGMENTATION))
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / draws.size) ** 0.5


def test_integers_are_uniform_and_in_range():
    assert integers(np.array([0, FULL], dtype=np.uint32), 9).tolist() == [0, 8]
    counts = np.bincount(integers(draw_words(0, 0, np.arange(9_000), 1, STREAM_AUGMENTATION)[:, 0], 9), minlength=9)
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1  # chi-square, 8 degrees of freedom, p = 0.001


def test_permutation_is_one_and_depends_on_seed_and_epoch():
    order = permutation(1, 0, 1000)
    assert sorted(order) == list(range(1000))
    np.testing.assert_array_equal(order, permutation(1, 0, 1000))
    assert (order != permutation(1, 1, 1000)).any()
    assert (order != permutation(2, 0, 1000)).any()
    assert permutation(0, 0, 0).shape == (0,)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_check_seed_accepts_64_bits(seed):
    assert check_seed(seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1"])
def test_check_seed_refuses_the_rest(seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        check_seed(seed)
