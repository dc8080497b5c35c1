"""Samples that an epoch shows more than once, as its sampler draws them or as several views, in every loader."""

import hashlib

import numpy as np
import pytest
import torch

from shike_fast.data import DeviceLoader, Loader, load_dataset, make_sampler
from shike_fast.data.augment.photo import PHOTO_AUGMENTATIONS
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.data.images.decode import open_image
from shike_fast.data.loaders.gpu import GpuPhotoLoader
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.data.sampling import count_repeats


def decode_on_cpu(encoded):
    return [torch.from_numpy(open_image(data.numpy().tobytes()).pixels()).permute(2, 0, 1) for data in encoded]


KINDS = {
    "here": lambda data, **options: Loader(data, **options),
    "workers": lambda data, **options: Loader(data, num_workers=2, **options),
    "device": lambda data, **options: DeviceLoader(data, device="cpu", ahead=2, **options),
    "files": lambda data, **options: PhotoLoader(data, device="cpu", num_workers=2, **options),
    "files by GPU": lambda data, **options: GpuPhotoLoader(data, device="cpu", decode=decode_on_cpu, **options),
}


class Case:
    """A loader of some kind, and a data set that it can load."""

    def __init__(self, kind, image_dir):
        self._make = KINDS[kind]
        self._loaders = []
        if kind.startswith("files"):
            self.dataset = load_dataset("imagefolder", data_dir=image_dir, image_size=24, augmentation="rrc").train
            self.other = "rrc-randaugment"
            if kind == "files by GPU":
                self.other = "none"  # the operations of RandAugment would magnify a difference of one grey level
                self.tolerance = 2 / 255 / 0.224
        else:
            images = np.random.default_rng(0).integers(0, 256, (53, 3, 16, 16), dtype=np.uint8)
            labels = np.repeat(np.arange(4), (40, 10, 2, 1))
            self.dataset = ArrayDataset(images, labels, mean=(0.4,), std=(0.2,), augmentation="crop-flip", seed=3)
            self.other = "cifar"

    tolerance = 0.0

    def loader(self, name="instance", **options):
        sampler = make_sampler(name, self.dataset.labels, epochs=4)
        made = self._make(self.dataset, **{"batch_size": 5, "shuffle": True, "sampler": sampler, **options})
        self._loaders.append(made)
        return made

    def assert_same(self, found, expected):
        assert len(found) == len(expected)
        for (images, labels), (other, other_labels) in zip(found, expected, strict=True):
            assert torch.equal(labels, other_labels)
            torch.testing.assert_close(images, other, rtol=0, atol=self.tolerance)

    def close(self):
        for loader in self._loaders:
            loader.close()


@pytest.fixture(params=KINDS)
def case(request, image_dir):
    made = Case(request.param, image_dir)
    yield made
    made.close()


def showings(loader, epoch=1, **options):
    """Images and labels of an epoch, sample by sample; only view 0."""
    batches = list(loader.epoch(epoch, **options))
    labels = torch.cat([labels for _, labels in batches])
    return torch.cat([images[: len(labels)] for images, labels in batches]), labels


def test_the_usual_order_and_augmentation_have_the_bits_of_version_0_2():
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    dataset = ArrayDataset(images, np.arange(50), mean=(0.5,) * 3, std=(0.25,) * 3, augmentation="crop-flip", seed=5)
    digest = hashlib.sha256()
    loader = Loader(dataset, batch_size=8, shuffle=True, sampler=make_sampler("instance", dataset.labels))
    for epoch in (0, 3):
        digest.update(loader.order(epoch).tobytes())
        for pixels, labels in loader.epoch(epoch):
            digest.update(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            digest.update(labels.numpy().tobytes())
    assert digest.hexdigest() == "b666229f15ff3d2115c564d6b25bc47260c691ae2da7cd424bd750d31554fdd1"
    words = PHOTO_AUGMENTATIONS["rrc-jitter-randaugment"].draw(np.arange(100), seed=7, epoch=2)
    expected = "e78ae0b6a5f939b6007a1fb51e05e28c5b4888b3194616c2c4c20ed6d6ed6c25"
    assert hashlib.sha256(np.ascontiguousarray(words).tobytes()).hexdigest() == expected


@pytest.mark.parametrize("name", ["class-aware", "square-root", "progressive"])
def test_a_sample_that_is_drawn_again_looks_different(case, name):
    loader = case.loader(name)
    order = loader.order(1)
    images, labels = showings(loader)
    np.testing.assert_array_equal(labels, case.dataset.labels[order])
    repeats = count_repeats(order)
    assert repeats.max() >= 1
    expected, _ = case.dataset.batch(order, seed=loader.seed, epoch=1, repeats=repeats)
    torch.testing.assert_close(images, expected, rtol=0, atol=case.tolerance)
    again = [images[order == image] for image in np.unique(order[repeats > 0])]
    assert all((shown[0] != shown[1:]).flatten(1).any(1).any() for shown in again)
    # the first showing is that of an epoch which shows each once
    plain, _ = case.dataset.batch(order[repeats == 0], seed=loader.seed, epoch=1)
    torch.testing.assert_close(images[torch.from_numpy(repeats == 0)], plain, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("views", [1, 2])
def test_an_epoch_resumes_in_the_middle(case, views):
    loader = case.loader("class-aware", views=[case.dataset] * views)
    whole = list(loader.epoch(2))
    for start in (1, len(whole) - 1):
        case.assert_same(list(loader.epoch(2, start_batch=start)), whole[start:])


@pytest.mark.parametrize("views", [1, 2])
def test_two_processes_share_what_is_drawn(case, views):
    options = {"batch_size": 4 if len(case.dataset) == 12 else 6, "views": [case.dataset] * views}
    alone = list(case.loader("class-aware", **options).epoch(0))
    ranks = [list(case.loader("class-aware", rank=r, world_size=2, **options).epoch(0)) for r in range(2)]
    for (images, labels), *shares in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([share for _, share in shares]), labels)
        by_view = zip(*(share.chunk(views) for share, _ in shares), strict=True)
        together = torch.cat([part for view in by_view for part in view])
        torch.testing.assert_close(together, images, rtol=0, atol=case.tolerance)


def test_views_follow_each_other_and_the_first_is_as_without(case):
    other = case.dataset.augmented_by(case.other)
    plain = case.loader()
    loader = case.loader(views=[case.dataset, other, case.dataset])
    assert loader.batches_per_epoch == plain.batches_per_epoch
    order = torch.from_numpy(loader.order(0)).split(5)
    for (images, labels), (expected, same), indices in zip(loader.epoch(0), plain.epoch(0), order, strict=True):
        assert torch.equal(labels, same)
        assert images.shape == (3 * len(labels), *expected.shape[1:])
        assert images.is_contiguous(memory_format=torch.channels_last)
        first, second, third = images.chunk(3)
        assert torch.equal(first, expected)
        for number, (view, source) in enumerate(((second, other), (third, case.dataset)), start=1):
            repeats = np.full(len(labels), number)
            seen, _ = source.batch(indices.numpy(), seed=loader.seed, epoch=0, repeats=repeats)
            torch.testing.assert_close(view, seen, rtol=0, atol=case.tolerance)
            assert (view != expected).any()


def test_views_of_a_repeated_draw_are_all_different(case):
    loader = case.loader("class-aware", views=[case.dataset] * 2)
    order = loader.order(0)
    image = np.bincount(order).argmax()
    batches = [images.unflatten(0, (2, -1)).transpose(0, 1) for images, _ in loader.epoch(0)]
    shown = torch.cat(batches)[torch.from_numpy(order == image)].flatten(0, 1)  # [draws * views, ...]
    assert len(shown) >= 4
    assert len({image.numpy().tobytes() for image in shown}) > len(shown) // 2  # small images have few windows


def test_a_sampler_may_be_replaced_between_epochs(case):
    loader = case.loader()
    first = showings(loader, epoch=0)
    loader.sampler = make_sampler("class-aware", case.dataset.labels)
    np.testing.assert_array_equal(showings(loader, epoch=1)[1], case.dataset.labels[loader.order(1)])
    loader.sampler = make_sampler("instance", case.dataset.labels)
    assert torch.equal(showings(loader, epoch=0)[0], first[0])


def test_without_shuffling_nothing_is_drawn(case):
    loader = case.loader("class-aware", shuffle=False)
    assert torch.equal(showings(loader)[1], torch.from_numpy(case.dataset.labels))


def test_a_set_with_another_augmentation_shares_the_images():
    dataset = ArrayDataset(np.zeros((4, 3, 8, 8), np.uint8), np.arange(4), mean=(0.5,), std=(0.5,))
    dataset.batch(np.arange(4), seed=0, epoch=0)
    other = dataset.augmented_by("crop-flip")
    assert (dataset.augmentation, other.augmentation) == ("none", "crop-flip")
    assert other.images is dataset.images and other.augmentation_on(torch.device("cpu"))._steps
    assert not dataset.augmentation_on(torch.device("cpu"))._steps
    with pytest.raises(ValueError, match="augmented_by: unknown augmentation 'rrc'; choose one of none, shift"):
        dataset.augmented_by("rrc")


def test_broken_files_are_counted_once_for_all_views(image_dir):
    (image_dir / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    train = load_dataset("imagefolder", data_dir=image_dir, image_size=24, augmentation="rrc").train
    for make in (KINDS["files"], KINDS["files by GPU"]):
        told = []
        loader = make(train, batch_size=6, shuffle=True, views=[train] * 2, report=told.append)
        for images, labels in loader.epoch(0):
            assert len(images) == 2 * len(labels)
        loader.close()
        assert len(told) == len(loader.broken) == 1


def test_a_file_is_opened_and_decoded_once_for_all_views(image_dir, monkeypatch):
    train = load_dataset("imagefolder", data_dir=image_dir, image_size=24, augmentation="rrc").train
    opened, decoded = [], []
    plain = train.store.open

    def watch(index):
        opened.append(index)
        picture = plain(index)
        pixels = picture.pixels
        picture.pixels = lambda reduction: decoded.append(index) or pixels(reduction)
        return picture

    monkeypatch.setattr(train.store, "open", watch)
    views = [train, train.augmented_by("rrc-randaugment"), train]
    list(PhotoLoader(train, batch_size=6, shuffle=True, device="cpu", num_workers=0, views=views).epoch(0))
    assert sorted(opened) == sorted(decoded) == list(range(12))  # at 24 to 60 pixels none is decoded at a half


def twice_on(device):
    images = np.random.default_rng(0).integers(0, 256, (500, 3, 32, 32), dtype=np.uint8)
    labels = np.repeat(np.arange(3), (450, 40, 10))
    dataset = ArrayDataset(images, labels, mean=(0.4,), std=(0.2,), augmentation="crop-flip")
    options = {"sampler": make_sampler("class-aware", labels), "views": [dataset, dataset.augmented_by("cifar")]}
    return list(DeviceLoader(dataset, batch_size=128, shuffle=True, device=device, **options).epoch(0))


def test_views_are_made_on_the_device():
    """The device "meta" holds no values: they cannot be read, and its tensors do not mix with those of the CPU."""
    for images, labels in twice_on("meta"):
        assert images.is_meta and labels.is_meta and len(images) == 2 * len(labels)
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    for (images, labels), (expected, same) in zip(twice_on("cuda"), twice_on("cpu"), strict=True):
        assert images.is_cuda and torch.equal(images.cpu(), expected) and torch.equal(labels.cpu(), same)
