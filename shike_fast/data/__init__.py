"""Long-tailed data sets: reading, checking, augmenting and loading them.

``load_dataset(name)`` gives a :class:`LongTailData`; a :class:`Loader` turns its ``train`` and ``test`` into batches, a
:class:`DeviceLoader` does so on the training device.
Importing a module below registers the data set that it holds.
"""

from shike_fast.data import cifar, digits, fashion_mnist, imagefolder, imagenet_lt, inat18, places_lt
from shike_fast.data.base import BatchSource, DatasetInfo, LongTailData, datasets, load_dataset
from shike_fast.data.device import DeviceLoader
from shike_fast.data.loader import Loader
from shike_fast.data.longtail import long_tail_counts

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
