"""Counter-based random numbers: every draw is a pure function of (seed, epoch, sample index, earlier showings).

There is no generator state, so a sample looks the same whichever worker loads it, wherever it stands in a batch and
however often the run was stopped and resumed. The function is Philox4x32-10 of Salmon et al., "Parallel Random Numbers:
As Easy as 1, 2, 3" (SC 2011), evaluated for a whole batch at once with NumPy.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# The last counter word separates independent streams drawn from one (seed, epoch).
STREAM_ORDER = 0
STREAM_AUGMENTATION = 1
STREAM_CLASSES = 2  # the order in which a sampler visits the classes
STREAM_SAMPLES = 3  # which samples it draws

_REPEAT_BITS = 8  # below a repeat's number in its counter word: that of a block of four words


def philox(
    counter: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]], key: tuple[int, int]
) -> NDArray[np.uint32]:
    """Philox4x32-10: four 32-bit words for each 128-bit counter.

    Args:
        counter: four broadcastable uint64 arrays, each holding one 32-bit counter word.
        key: two 32-bit key words.

    Returns:
        uint32 array of the broadcast shape with one more axis of length 4.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * _MULTIPLIERS[0]  # 32 x 32 bits: no overflow of the 64
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF
        k1 = (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def check_seed(seed: int) -> int:
    """Return ``seed``, or raise ValueError when it does not fit the 64-bit key."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return seed


def draw_words(
    seed: int,
    epoch: int,
    indices: NDArray[np.int64],
    words: int,
    stream: int,
    repeats: NDArray[np.int64] | None = None,
) -> NDArray[np.uint32]:
    """Random words of samples: each row is a function of (seed, epoch, index, repeat) alone.

    Args:
        seed, epoch: what all rows share.
        indices: int64 [B], the samples.
        words: their number, at most 1024.
        stream: one of the ``STREAM_`` constants.
        repeats: int64 [B], below 2**24: how many times the epoch has shown each sample before. None: never.

    Returns:
        uint32 [B, words].
    """
    blocks = np.arange((words + 3) // 4, dtype=np.uint64)[None, :]
    if repeats is not None:
        blocks = blocks + (repeats.astype(np.uint64)[:, None] << np.uint64(_REPEAT_BITS))
    counter = (
        indices.astype(np.uint64)[:, None],
        blocks,
        np.full((1, 1), epoch, dtype=np.uint64),
        np.full((1, 1), stream, dtype=np.uint64),
    )
    raw = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))  # [B, blocks, 4]
    return raw.reshape(len(indices), 4 * blocks.shape[1])[:, :words]


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Map random words to [0, 1)."""
    return words.astype(np.float64) * 2.0**-32


def integers(words: NDArray[np.uint32], count: int) -> NDArray[np.int64]:
    """Map random words to 0 … count-1; uniform up to a bias of count / 2**32."""
    return ((words.astype(np.uint64) * np.uint64(count)) >> _SHIFT).astype(np.int64)


def long_words(
    seed: int, epoch: int, indices: NDArray[np.int64], stream: int, repeats: NDArray[np.int64] | None = None
) -> NDArray[np.uint64]:
    """A random word of 64 bits for each sample, uint64 [B]; the arguments are those of :func:`draw_words`."""
    words = draw_words(seed, epoch, indices, 2, stream, repeats).astype(np.uint64)
    return (words[:, 0] << _SHIFT) | words[:, 1]


def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """The order of an epoch: a random permutation of 0 … length-1 that depends on (seed, epoch) alone."""
    return np.argsort(long_words(seed, epoch, np.arange(length), STREAM_ORDER), kind="stable")
