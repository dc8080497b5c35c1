import math

import numpy as np
import pytest

from shike_fast.data import datasets, load_dataset
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, fingerprint


def test_the_registry_describes_every_data_set():
    infos = datasets()
    assert set(infos) >= {"digits-lt", "fashion-mnist-lt", "cifar10-lt", "cifar100-lt", "imagefolder"}
    for name, info in infos.items():
        assert info.name == name
        assert info.description
        assert info.how_obtained
        assert "none" in info.augmentations
    defaults = {name: (info.default_imbalance_factor, info.augmentations[0]) for name, info in infos.items()}
    assert defaults["digits-lt"] == (20, "shift")
    assert defaults["fashion-mnist-lt"] == (100, "crop-flip")
    assert defaults["cifar10-lt"] == defaults["cifar100-lt"] == (100, "cifar")
    assert defaults["imagefolder"] == (None, "rrc")


def test_a_name_is_registered_once():
    info = DatasetInfo("digits-lt", "", "", None, ("none",))
    with pytest.raises(ValueError, match="'digits-lt' is registered already"):
        register_dataset(info)(lambda info, options: None)


def test_unknown_name(data_error):
    with data_error("unknown data set 'cifar-10'", "digits-lt", "cifar10-lt"):
        load_dataset("cifar-10")


def test_unknown_augmentation(data_error):
    with data_error("digits-lt: unknown augmentation 'mixup'", "shift, none, crop-flip, cifar"):
        load_dataset("digits-lt", augmentation="mixup")
    with data_error("imagefolder: unknown augmentation 'cifar'"):
        load_dataset("imagefolder", augmentation="cifar")


@pytest.mark.parametrize("factor", [0.99, math.nan, math.inf])
def test_unusable_imbalance_factor(factor, data_error):
    with data_error("imbalance_factor", "at least 1"):
        load_dataset("digits-lt", imbalance_factor=factor)


def test_image_size_only_where_there_is_a_choice(data_error):
    with data_error("cifar10-lt: image_size cannot be chosen"):
        load_dataset("cifar10-lt", image_size=16)
    with data_error("imagefolder: image_size must be from 1 to 4096, got 0"):
        load_dataset("imagefolder", image_size=0)


def test_download_only_where_it_is_offered(data_error):
    with data_error("fashion-mnist-lt: cannot be downloaded", "apt-get install dataset-fashion-mnist"):
        load_dataset("fashion-mnist-lt", download=True)


@pytest.mark.parametrize("name", ["cifar10-lt", "cifar100-lt", "imagefolder"])
def test_missing_data_dir(name, data_error):
    with data_error(f"{name}: needs --data-dir"):
        load_dataset(name)


def test_data_dir_that_is_no_folder(tmp_path, data_error):
    with data_error("cifar10-lt: --data-dir", tmp_path / "absent", "is not a folder", "cifar-10-binary.tar.gz"):
        load_dataset("cifar10-lt", data_dir=tmp_path / "absent")


def test_unusable_seed(data_error):
    with data_error("seed must be an integer", "-1"):
        load_dataset("digits-lt", seed=-1)


def test_fingerprint_tells_types_shapes_and_order_apart():
    array = np.arange(6, dtype=np.int64)
    variants = [
        (array,),
        (array.reshape(2, 3),),
        (array.astype(np.int32),),
        (array[:5], array[5:]),
        (array[::-1],),
        (array.tobytes(),),
        (b"ab", b"c"),
        (b"a", b"bc"),
    ]
    digests = {fingerprint(*parts) for parts in variants}
    assert len(digests) == len(variants)
    assert fingerprint(array) == fingerprint(array.copy())
    assert all(len(digest) == 64 for digest in digests)
