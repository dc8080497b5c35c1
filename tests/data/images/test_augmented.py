"""Parts of a data set, and another augmentation of it: what both kinds of images have in common."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shike_fast import data
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore

CHOSEN = np.array([4, 0, 2], np.int64)


def array_set(augmentation):
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    return ArrayDataset(images, np.arange(6), mean=(0.5,) * 3, std=(0.2,) * 3, augmentation=augmentation)


def file_set(augmentation, root: Path):
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())[:6]
    return ImageDataset(
        FileStore(root, PathTable(files)),
        np.arange(6),
        augmentation=augmentation,
        size=16,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        training=False,
    )


@pytest.fixture(params=["arrays", "files"])
def make(request, image_dir):
    """``make(augmentation)``, and the name of one that changes images."""
    if request.param == "arrays":
        return array_set, "crop-flip"
    return (lambda augmentation: file_set(augmentation, image_dir)), "rrc"


def test_samples_come_in_the_order_that_is_asked_for(make):
    whole = make[0]("none")
    chosen = whole.selected(CHOSEN)
    assert len(chosen) == 3 and chosen.labels.tolist() == CHOSEN.tolist()
    for place, index in enumerate(CHOSEN):
        assert torch.equal(chosen[place][0], whole[index][0])
    assert len(whole) == 6 and whole.labels.tolist() == list(range(6))


def test_the_augmentation_is_the_one_that_is_named(make):
    dataset, name = make
    everything = np.arange(6, dtype=np.int64)
    whole = dataset("none")
    chosen, trained = whole.augmented_by(name), dataset(name)
    for epoch in (0, 1):
        images, labels = chosen.batch(everything, seed=3, epoch=epoch)
        expected, _ = trained.batch(everything, seed=3, epoch=epoch)
        assert torch.equal(images, expected) and labels.tolist() == list(range(6))
        assert not torch.equal(images, whole.batch(everything, seed=3, epoch=epoch)[0])
    assert whole.augmentation == "none"


def test_it_can_be_loaded(make):
    chosen = make[0]("none").selected(CHOSEN).augmented_by(make[1])
    first, second = (list(data.Loader(chosen, batch_size=2, shuffle=False).epoch(epoch)) for epoch in (0, 1))
    assert [len(labels) for _, labels in first] == [2, 1]
    assert not torch.equal(first[0][0], second[0][0])


def test_a_test_image_that_cannot_be_read_is_grey_in_the_part_too(image_dir, capsys):
    dataset = file_set("none", image_dir)
    Path(dataset.store.name(2)).write_bytes(b"no image")
    images, _ = dataset.selected(CHOSEN).batch(np.arange(3), seed=0, epoch=0)
    assert images[2].std() == pytest.approx(0, abs=1e-6)
    assert "it is tested as plain grey" in capsys.readouterr().err


def test_an_augmentation_that_there_is_not(make):
    with pytest.raises(ValueError, match="augmented_by: unknown augmentation 'sepia'; choose one of "):
        make[0]("none").augmented_by("sepia")
