"""The loader of images on the device against the one of images in main memory."""

import numpy as np
import pytest
import torch

from shike_fast.data import DeviceLoader, Loader
from shike_fast.data.augment.small import AUGMENTATIONS
from shike_fast.data.images.arrays import ArrayDataset


def make(count=50, augmentation="cifar", shape=(3, 16, 16), seed=0):
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    statistics = {"mean": (0.4, 0.5, 0.6)[: shape[0]], "std": (0.2, 0.25, 0.3)[: shape[0]]}
    return ArrayDataset(images, np.arange(count), augmentation=augmentation, seed=seed, **statistics)


def on_cpu(dataset, **arguments):
    return DeviceLoader(dataset, **{"batch_size": 8, "shuffle": True, "device": "cpu", **arguments})


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 23)], ids=str)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batches_equal_those_of_the_other_loader(augmentation, shape, shuffle):
    dataset = make(100, augmentation, shape, seed=3)
    plain = Loader(dataset, batch_size=24, shuffle=shuffle, seed=9)
    loader = on_cpu(dataset, batch_size=24, shuffle=shuffle, seed=9)
    assert loader.batches_per_epoch == plain.batches_per_epoch == len(loader.epoch(0)) == 5
    for epoch in (0, 7):
        np.testing.assert_array_equal(loader.order(epoch), plain.order(epoch))
        assert_same(list(loader.epoch(epoch)), list(plain.epoch(epoch)))


def test_the_form_of_a_batch():
    *whole, short = on_cpu(make()).epoch(0)
    assert len(whole) == 6
    for images, labels in [*whole, short]:
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.shape == (len(labels), 3, 16, 16)
    assert len(short[1]) == 2


def test_every_sample_once_an_epoch_in_a_new_order():
    loader = on_cpu(make(), seed=1)
    orders = [torch.cat([labels for _, labels in loader.epoch(epoch)]).tolist() for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("ahead", [1, 2, 3, 7, 100])
def test_batches_ahead_change_nothing(ahead):
    dataset = make()
    assert_same(list(on_cpu(dataset, ahead=ahead).epoch(2)), list(on_cpu(dataset).epoch(2)))


@pytest.mark.parametrize("ahead", [None, 2])
@pytest.mark.parametrize("start", [0, 3, 6, 7])
def test_start_batch_resumes_exactly(start, ahead):
    loader = on_cpu(make(), ahead=ahead)
    whole = list(loader.epoch(1))
    rest = loader.epoch(1, start_batch=start)
    assert len(rest) == 7 - start
    assert_same(list(rest), whole[start:])
    loader.close()
    assert_same(list(rest), whole[start:])


def test_by_default_as_many_batches_ahead_as_suit_the_device():
    dataset = make(shape=(3, 32, 32))
    for batch_size, ahead in ((1, 1024), (128, 8), (1000, 1), (5000, 1)):
        assert on_cpu(dataset, batch_size=batch_size)._ahead == ahead
    assert on_cpu(dataset, batch_size=50, shuffle=False, rank=1, world_size=2)._ahead == 1024 // 25
    assert DeviceLoader(dataset, batch_size=128, shuffle=True, device="meta")._ahead == 85


def test_the_epochs_of_two_iterators_do_not_disturb_each_other():
    loader = on_cpu(make(), ahead=2)
    expected = list(loader.epoch(0)), list(loader.epoch(1))
    pairs = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for number in range(2):
        assert_same([pair[number] for pair in pairs], expected[number])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_batch_belongs_to_who_receives_it(augmentation):
    dataset = make(augmentation=augmentation)
    images, labels = dataset.images.copy(), dataset.labels.copy()
    loader = on_cpu(dataset)
    expected = [(x.clone(), y.clone()) for x, y in loader.epoch(0)]
    for x, y in loader.epoch(0):
        x.zero_()
        y.fill_(-1)
    assert_same(list(loader.epoch(0)), expected)
    np.testing.assert_array_equal(dataset.images, images)
    np.testing.assert_array_equal(dataset.labels, labels)


def test_arrays_that_may_not_be_written():
    dataset = make()
    expected = list(on_cpu(dataset).epoch(0))
    dataset.images.flags.writeable = dataset.labels.flags.writeable = False
    assert_same(list(on_cpu(dataset).epoch(0)), expected)


def test_loading_does_not_advance_the_global_generators():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(on_cpu(make()).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch(world_size):
    dataset = make(53)
    expected = list(on_cpu(dataset).epoch(1))
    shares = [list(on_cpu(dataset, rank=rank, world_size=world_size).epoch(1)) for rank in range(world_size)]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
    assert_same(together, expected)
    labels = torch.cat([labels for _, labels in together])
    assert sorted(labels.tolist()) == list(range(53))
    for rank, batches in enumerate(shares):
        assert_same(
            batches, list(Loader(dataset, batch_size=8, shuffle=True, rank=rank, world_size=world_size).epoch(1))
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "DeviceLoader: batch_size must be at least 1, got 0"),
        ({"ahead": 0}, "DeviceLoader: ahead must be at least 1, got 0"),
        ({"seed": -5}, "seed must be an integer"),
        ({"world_size": 0}, "DeviceLoader: world_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "DeviceLoader: rank must be from 0 to 1, got 2"),
        ({"world_size": 3}, "DeviceLoader: the last batch of 50 samples in batches of 8 holds 2, too few for 3 proc"),
    ],
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_cpu(make(), **arguments)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (2**32, 0), (0, 8), (0, -1)])
def test_unusable_epochs(epoch, start):
    with pytest.raises(ValueError, match=r"DeviceLoader: (epoch|start_batch) must be from 0 to"):
        on_cpu(make()).epoch(epoch, start)


def test_one_mean_for_all_channels():
    images = make().images
    dataset = ArrayDataset(images, np.arange(50), mean=(0.5,), std=(0.25,), augmentation="cifar")
    assert_same(list(on_cpu(dataset).epoch(0)), list(Loader(dataset, batch_size=8, shuffle=True).epoch(0)))


def test_everything_happens_on_the_device():
    """The device "meta" holds no values: they cannot be read, and its tensors do not mix with those of the CPU."""
    for images, labels in DeviceLoader(make(500), batch_size=128, shuffle=True, device="meta").epoch(0):
        assert images.is_meta and labels.is_meta
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 23)], ids=str)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_cuda_gives_what_the_cpu_gives(augmentation, shape):
    dataset = make(2000, augmentation, shape)
    expected = list(on_cpu(dataset, batch_size=128).epoch(1))
    loader = DeviceLoader(dataset, batch_size=128, shuffle=True, device="cuda")
    found = list(loader.epoch(1))
    assert all(images.is_cuda and labels.is_cuda for images, labels in found)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in found)
    assert_same([(images.cpu(), labels.cpu()) for images, labels in found], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [None, 1])
def test_cuda_is_never_waited_for(ahead):
    loader = DeviceLoader(make(2000), batch_size=128, shuffle=True, device="cuda", ahead=ahead)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in loader.epoch(0)) == 16
    finally:
        torch.cuda.set_sync_debug_mode("default")
