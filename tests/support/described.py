"""Data sets of labels alone, and their descriptions."""

import numpy as np
import torch

from shike_fast import data


class Samples:
    """Samples of a program's own kind, of which only the labels count here."""

    wants_workers, seed = False, 0

    def __init__(self, labels):
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self):
        return len(self.labels)


def made(train, test, names):
    """A data set of somebody's own."""
    counts = torch.bincount(torch.tensor(train, dtype=torch.int64), minlength=len(names))
    setting = {"in_channels": 3, "image_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return data.LongTailData(
        name="mine",
        train=Samples(train),
        test=Samples(test),
        class_names=tuple(names),
        class_counts=counts,
        imbalance_factor=None,
        augmentation="none",
        fingerprint="0",
        **setting,
    )


def of_sizes(train, test=None, names=None):
    """The description of classes of these sizes."""
    test = [2] * len(train) if test is None else test
    names = [f"class {label}" for label in range(len(train))] if names is None else names
    labels = [np.repeat(np.arange(len(sizes)), sizes).tolist() for sizes in (train, test)]
    return data.describe(made(*labels, names))
