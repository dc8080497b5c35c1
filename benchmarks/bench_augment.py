"""The ``cifar`` augmentation of 32 x 32 x 3 images: Pillow image by image against batches on the training device.

All contenders are loaders that gather, augment and normalise, in batches of 128. ``one by one`` is ``--loader cpu``
without workers, ``batched`` is ``--loader device``: with as many batches augmented at a time as by default, one, or all
of the epoch. A call is an epoch, of one batch or of as many images as CIFAR-100-LT with an imbalance factor of 100 has.
"""

import itertools

import numpy as np
import pytest

from shike_fast.data import DeviceLoader, Loader
from shike_fast.data.images.arrays import ArrayDataset

BATCH, EPOCH = 128, 10_847
CASES = dict.fromkeys(("cpu", "cuda"), (f"{BATCH} images", f"{EPOCH} images"))
CALLS, ROUNDS = {BATCH: 8, EPOCH: 1}, {BATCH: 9, EPOCH: 3}


@pytest.mark.op("cifar augmentation")
def test_augmentation(case, device, peak_memory, side_by_side):
    count = int(case.split()[0])
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    dataset = ArrayDataset(images, np.zeros(count, np.int64), augmentation="cifar", **statistics)
    settings = {"batch_size": BATCH, "shuffle": True}
    loaders: dict[str, Loader | DeviceLoader] = {}
    if device.type == "cpu":
        loaders["one by one"] = Loader(dataset, **settings)
    loaders["batched"] = DeviceLoader(dataset, device=device, **settings)
    if count > BATCH:
        loaders["batched, 128 at a time"] = DeviceLoader(dataset, device=device, ahead=1, **settings)
        loaders["batched, the epoch at a time"] = DeviceLoader(dataset, device=device, ahead=count, **settings)
    epochs = itertools.count()

    def load(loader: Loader | DeviceLoader) -> None:
        for batch in loader.epoch(next(epochs)):
            del batch

    calls = {name: lambda loader=loader: load(loader) for name, loader in loaders.items()}
    facts = {name: {"peak_extra_bytes": peak_memory(call)} for name, call in calls.items()}
    side_by_side(calls, images=count, calls=CALLS[count], rounds=ROUNDS[count], facts=facts)
