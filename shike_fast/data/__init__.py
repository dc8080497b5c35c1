"""Long-tailed data sets: reading, checking, augmenting and loading them.

``load_dataset(name)`` gives a :class:`LongTailData`; a :class:`Loader` turns its ``train`` and ``test`` into batches, a
:class:`DeviceLoader` does so on the training device.
Importing a module below registers the data set that it holds.
"""

from shike_fast.data.datasets import cifar, digits, fashion_mnist, imagefolder, imagenet_lt, inat18, places_lt
from shike_fast.data.loaders.device import DeviceLoader
from shike_fast.data.loaders.loader import Loader
from shike_fast.data.longtail import long_tail_counts
from shike_fast.data.types import BatchSource, DatasetInfo, LongTailData, datasets, load_dataset

__all__ = [
    "BatchSource",
    "DatasetInfo",
    "DeviceLoader",
    "Loader",
    "LongTailData",
    "cifar",
    "datasets",
    "digits",
    "fashion_mnist",
    "imagefolder",
    "imagenet_lt",
    "inat18",
    "load_dataset",
    "long_tail_counts",
    "places_lt",
]
