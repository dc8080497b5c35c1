"""The programs of test_worker_memory.py: what each one returns is printed as JSON."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from shike_fast.data import Loader, load_dataset
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.stores import FileStore
from shike_fast.data.loaders.loader import Request
from shike_fast.data.loaders.photo import PhotoLoader


def private_kibibytes(loader):
    """What each worker has written and shares with no other process."""
    used = []
    for worker in loader._pool.processes:
        with open(f"/proc/{worker.pid}/smaps_rollup") as file:
            used.append(next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")))
    return used


class Collecting:
    """Sixteen samples; a worker looks for garbage while it loads them."""

    def __init__(self):
        self.labels = np.arange(16)
        self.seed = 0

    def __len__(self):
        return 16

    def batch(self, indices, *, seed, epoch):
        gc.collect()
        return torch.zeros(len(indices), 1, 1, 1), torch.from_numpy(self.labels[indices])


def garbage():
    """Memory of a worker that collects garbage, and of the objects of the main process."""
    ballast = [[] for _ in range(2_000_000)]
    with_ballast = Loader(Collecting(), batch_size=4, shuffle=True, num_workers=2)
    list(with_ballast.epoch(0))
    return max(private_kibibytes(with_ballast)), sys.getsizeof([]) * len(ballast) // 1024


def photographs(loader, epochs):
    """Memory of all workers after each epoch."""
    used = []
    for epoch in range(epochs):
        list(loader.epoch(epoch))
        used.append(sum(private_kibibytes(loader)))
    return used


def make(dataset, batch_size):
    return PhotoLoader(dataset, batch_size=batch_size, shuffle=True, device=torch.device("cpu"), num_workers=2)


def load(root):
    return load_dataset("imagefolder", data_dir=Path(root), image_size=32, augmentation="rrc").train


def epochs(root):
    return photographs(make(load(root), 4), 200)


def size(root):
    """After as many images of a data set of forty thousand times the size."""
    few = load(root)
    repeats = 40_000
    many = ImageDataset(
        FileStore(Path(root), few.store.paths.take(np.tile(np.arange(12), repeats))),
        np.tile(few.labels, repeats),
        augmentation="rrc",
        size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    loader = make(many, 120_000)
    parts = np.split(loader.order(0)[:1200], 300)
    loader._requests = lambda epoch, start: [Request(part, loader.seed, epoch) for part in parts]
    return photographs(loader, 2)


PR_SET_THP_DISABLE = 41  # of prctl(); pages of 2 MiB would count whole


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
