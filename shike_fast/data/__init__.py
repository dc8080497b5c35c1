"""Long-tailed data sets: reading, checking, augmenting and loading them.

``load_dataset(name)`` gives a :class:`LongTailData`; a :class:`Loader` turns its ``train`` and ``test`` into batches, a
:class:`DeviceLoader` does so on the training device. :func:`register_dataset` makes a data set of your own known.
"""

# The module of a data set registers it: they are listed in this order, small ones first.
# isort: off
from shike_fast.data.datasets import digits, fashion_mnist, cifar, imagenet_lt, inat18, places_lt, imagefolder
from shike_fast.data.datasets import table, huggingface, webdataset

# isort: on
from shike_fast._util.options import option
from shike_fast.data.augment.photo import photo_augmentations
from shike_fast.data.datasets.layouts import load_listed_images
from shike_fast.data.datasets.lists import read_list
from shike_fast.data.datasets.validation import SplitOptions
from shike_fast.data.datasets.wrapped import from_dataset
from shike_fast.data.description.describe import Description, describe
from shike_fast.data.images.arrays import ArrayDataset, build_arrays
from shike_fast.data.images.files import ImageDataset, ImagePart, build_images
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore
from shike_fast.data.loaders.device import DeviceLoader
from shike_fast.data.loaders.loader import Loader
from shike_fast.data.longtail import long_tail_counts
from shike_fast.data.recipes import PHOTOGRAPHS, SMALL_IMAGES
from shike_fast.data.registry import datasets, load_dataset, register_dataset
from shike_fast.data.sampling import SAMPLERS, Sampler, make_sampler
from shike_fast.data.shots import shot_accuracy
from shike_fast.data.types import BatchSource, Counts, DatasetInfo, LoadOptions, LongTailData, ValidationSplit

__all__ = [
    "PHOTOGRAPHS",
    "SAMPLERS",
    "SMALL_IMAGES",
    "ArrayDataset",
    "BatchSource",
    "Counts",
    "DatasetInfo",
    "Description",
    "DeviceLoader",
    "FileStore",
    "ImageDataset",
    "ImagePart",
    "LoadOptions",
    "Loader",
    "LongTailData",
    "PathTable",
    "Sampler",
    "SplitOptions",
    "ValidationSplit",
    "build_arrays",
    "build_images",
    "cifar",
    "datasets",
    "describe",
    "digits",
    "fashion_mnist",
    "from_dataset",
    "huggingface",
    "imagefolder",
    "imagenet_lt",
    "inat18",
    "load_dataset",
    "load_listed_images",
    "long_tail_counts",
    "make_sampler",
    "option",
    "photo_augmentations",
    "places_lt",
    "read_list",
    "register_dataset",
    "shot_accuracy",
    "table",
    "webdataset",
]
