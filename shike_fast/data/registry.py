"""The data sets by name: :func:`register_dataset` adds one, :func:`load_dataset` loads one."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from shike_fast._util.options import Option, Owned, collect_options, options_of
from shike_fast.data.longtail import check_imbalance_factor, check_profile, check_subset
from shike_fast.data.pack import reader
from shike_fast.data.random import check_seed
from shike_fast.data.recipes import PHOTOGRAPHS, SMALL_IMAGES
from shike_fast.data.types import MOST_PIXELS_A_SIDE, DatasetInfo, LoadOptions, LongTailData
from shike_fast.errors import ConfigError, DataError

LoadFunction = Callable[[DatasetInfo, LoadOptions], LongTailData]

_SMALL_SIDE = 64  # pixels: up to here a data set without a recipe is trained like CIFAR

_REGISTRY: dict[str, tuple[DatasetInfo, LoadFunction]] = {}


def register_dataset(info: DatasetInfo) -> Callable[[LoadFunction], LoadFunction]:
    """Decorate the function that loads the data set described by ``info``, in this package or in a module of your own.

    From the import of that module on, all commands in the process know the data set by ``info.name``. A complete one,
    of image files that lists of lines ``relative/path label`` name::

        from shike_fast import data

        @data.register_dataset(
            data.DatasetInfo(
                name="birds",
                description="200 species of birds",
                how_obtained="--data-dir DIR with images/, train.txt and test.txt",
                default_imbalance_factor=None,
                augmentations=data.photo_augmentations("rrc-randaugment"),
                resizable=True,
                counts=data.Counts(classes=200, images={"train": 5_994, "test": 5_794}),  # optional
                recipe=data.PHOTOGRAPHS | {"epochs": 100, "lr": 0.05},  # optional
            )
        )
        def load(info, options):
            return data.load_listed_images(info, options, train="train.txt", test="test.txt", folder="images")

    A loading function for images in memory returns :func:`shike_fast.data.build_arrays` of uint8 arrays; one that finds
    its image files in another way returns :func:`shike_fast.data.build_images`; one that has data sets of PyTorch
    returns :func:`shike_fast.data.from_dataset`.

    Args:
        info: the description. What its recipe leaves out is as in :data:`shike_fast.data.recipes.PHOTOGRAPHS` if it is
            resizable, else as in :data:`shike_fast.data.recipes.SMALL_IMAGES`.

    Raises:
        ValueError: another data set has that name.
    """

    def register(load: LoadFunction) -> LoadFunction:
        if info.name in _REGISTRY:
            raise ValueError(f"register_dataset: {info.name!r} is registered already")
        _REGISTRY[info.name] = (with_recipe(info), load)
        return load

    return register


@contextlib.contextmanager
def passed_on(dataset: LongTailData | None) -> Iterator[None]:
    """While the context lasts, :func:`load_dataset` gives this object for its name; None changes nothing."""
    if dataset is None:
        yield
        return
    before = _REGISTRY.get(dataset.name)
    info = dataset.info or (_info_of(dataset) if before is None else before[0])
    _REGISTRY[dataset.name] = (info, lambda info, options: dataset)
    try:
        yield
    finally:
        if before is None:
            del _REGISTRY[dataset.name]
        else:
            _REGISTRY[dataset.name] = before


def _info_of(dataset: LongTailData) -> DatasetInfo:
    """What there is to say of a data set that nobody registered."""
    known = getattr(dataset.train, "augmentations", ())
    return DatasetInfo(
        name=dataset.name,
        description="a data set that a program passed",
        how_obtained="pass it to shike_fast.train again",
        default_imbalance_factor=dataset.imbalance_factor,
        augmentations=(dataset.augmentation, *(name for name in known if name != dataset.augmentation)),
        recipe=SMALL_IMAGES if dataset.image_size <= _SMALL_SIDE else PHOTOGRAPHS,
    )


def with_recipe(info: DatasetInfo) -> DatasetInfo:
    """The description with a whole recipe."""
    usual = PHOTOGRAPHS if info.resizable else SMALL_IMAGES
    return dataclasses.replace(info, recipe=usual | dict(info.recipe))


def datasets() -> dict[str, DatasetInfo]:
    """All data sets by name."""
    return {name: info for name, (info, _) in _REGISTRY.items()}


def dataset_options(taken: Mapping[str, Option] | None = None) -> Owned:
    """The options that single data sets declare (``DatasetInfo.options``), by name.

    Args:
        taken: options of others, whose names and flags they must not have.

    Raises:
        ConfigError: if they have, or two of a name are of different types.
    """
    return collect_options("data set", {name: info.options for name, info in datasets().items()}, taken)


def named_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parsed arguments of a command that are options of data sets, and were given."""
    return {name: arguments[name] for name in dataset_options() if name in arguments}


def load_dataset(
    name: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    imbalance_factor: float | None = None,
    augmentation: str | None = None,
    image_size: int | None = None,
    download: bool = False,
    verify: bool = True,
    seed: int = 0,
    strict: bool = False,
    subset: str = "first",
    long_tail: str = "exp",
    **own: Any,
) -> LongTailData:
    """Load a long-tailed data set.

    Args:
        name: one of :func:`datasets`.
        data_dir: folder with its files, or a pack of it; None for the place where the system's package puts them.
        imbalance_factor: IF of the long-tail subset (:func:`shike_fast.data.long_tail_counts`); None for the data set's
            default.
        augmentation: training augmentation; None for the data set's default.
        image_size: side of the images in pixels, for data sets of image files (default 224) and ``digits-lt`` (8).
        download: fetch missing files into ``data_dir`` (data sets that say so in :func:`datasets`).
        verify: check archive checksums and the exact number of records. Labels and formats are checked always.
        seed: seed of the augmentation, unless a loader names its own.
        strict: raise DataError at the first image file that cannot be read, where another one would replace it.
        subset: which images of a class the long-tail subset holds, a key of ``shike_fast.data.longtail.SUBSETS``.
        long_tail: how its classes shrink, a key of ``shike_fast.data.longtail.PROFILES``.
        own: options that this data set has alone, by name: docs/data.md lists them.

    Returns:
        The training set, the test set and what describes them.

    Raises:
        DataError: an unknown name, an unusable argument, or files that are missing, incomplete or corrupt.
    """
    if name not in _REGISTRY:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(_REGISTRY)}")
    info, load = _REGISTRY[name]
    options = check_options(
        info,
        data_dir=data_dir,
        imbalance_factor=imbalance_factor,
        augmentation=augmentation,
        image_size=image_size,
        download=download,
        verify=verify,
        seed=seed,
        strict=strict,
        subset=subset,
        long_tail=long_tail,
        **own,
    )
    if options.data_dir is not None and reader.is_pack(options.data_dir):
        return reader.load_pack(info, options, options.data_dir)
    return load(info, options)


def check_options(
    info: DatasetInfo,
    *,
    data_dir: str | PathLike[str] | None = None,
    imbalance_factor: float | None = None,
    augmentation: str | None = None,
    image_size: int | None = None,
    download: bool = False,
    verify: bool = True,
    seed: int = 0,
    strict: bool = False,
    subset: str = "first",
    long_tail: str = "exp",
    **own: Any,
) -> LoadOptions:
    """The arguments of :func:`load_dataset` for a data set, checked, with its defaults.

    Raises:
        DataError: naming the first unusable one.
    """
    name = info.name
    if augmentation is None:
        augmentation = info.augmentations[0]
    if augmentation not in info.augmentations:
        raise DataError(f"{name}: unknown augmentation {augmentation!r}; choose one of {', '.join(info.augmentations)}")
    if image_size is not None and not info.resizable:
        raise DataError(f"{name}: image_size cannot be chosen, this data set has images of one size")
    if image_size is not None and not 1 <= image_size <= MOST_PIXELS_A_SIDE:
        raise DataError(f"{name}: image_size must be from 1 to {MOST_PIXELS_A_SIDE}, got {image_size}")
    if download and not info.downloadable:
        raise DataError(f"{name}: cannot be downloaded by this program; {info.how_obtained}")
    # A folder that is still to be downloaded into need not exist yet.
    if data_dir is not None and not download and not Path(data_dir).is_dir():
        raise DataError(f"{name}: --data-dir {data_dir} is not a folder; {info.how_obtained}")
    if imbalance_factor is None:
        imbalance_factor = info.default_imbalance_factor
    if check_subset(subset) != "first" and imbalance_factor is None:
        raise DataError(f"{name}: subset {subset!r} needs an imbalance factor, this data set is used whole")
    if check_profile(long_tail) != "exp" and imbalance_factor is None:
        raise DataError(f"{name}: long_tail {long_tail!r} needs an imbalance factor, this data set is used whole")
    try:
        check_seed(seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    return LoadOptions(
        data_dir=None if data_dir is None else Path(data_dir),
        imbalance_factor=None if imbalance_factor is None else check_imbalance_factor(imbalance_factor),
        augmentation=augmentation,
        download=download,
        verify=verify,
        seed=seed,
        image_size=image_size,
        strict=strict,
        subset=subset,
        long_tail=long_tail,
        own=_own_options(info, own),
    )


def _own_options(info: DatasetInfo, given: Mapping[str, Any]) -> Any:
    """The options of the data set alone, checked; None where it has none."""
    known = {} if info.options is None else options_of(info.options)
    for name in given.keys() - known.keys():
        owners = ", ".join(repr(owner) for owner, _ in dataset_options().get(name, []))
        belongs = f"it belongs to {owners}" if owners else "nor has another"
        raise DataError(f"{info.name}: has no option {name}, {belongs}")
    try:
        checked = {name: known[name].check(value) for name, value in given.items()}
    except ConfigError as error:
        raise DataError(f"{info.name}: {error}") from error
    return None if info.options is None else info.options(**checked)
