"""What worker processes load, beside what the test's own process does."""

import numpy as np

from shike_fast.data import Loader


def assert_workers_read_the_same(train):
    """The images of an epoch are the same without workers and with two."""
    batches = []
    for workers in (0, 2):
        loader = Loader(train, batch_size=4, shuffle=True, num_workers=workers)
        batches.append(np.concatenate([images.numpy() for images, _ in loader.epoch(0)]))
        loader.close()
    assert np.array_equal(*batches)
