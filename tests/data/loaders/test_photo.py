"""Loaders of image files: the same batches for any number of workers, what they say of broken images and of speed."""

import contextlib
import importlib.util
import itertools
import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

from shike_fast.data import load_dataset
from shike_fast.data.images.broken import Broken, BrokenImages
from shike_fast.data.images.decode import open_image
from shike_fast.data.loaders import loader as loader_module
from shike_fast.data.loaders.gpu import GpuPhotoLoader
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.data.loaders.prefetch import Prefetcher

CPU = torch.device("cpu")


def load(root, **options):
    return load_dataset("imagefolder", data_dir=root, **{"image_size": 32, "augmentation": "rrc-jitter", **options})


def decode_on_cpu(encoded):
    """What a GPU's decoder does, with libjpeg-turbo."""
    return [torch.from_numpy(open_image(data.numpy().tobytes()).pixels()).permute(2, 0, 1) for data in encoded]


def make(kind, dataset, **options):
    settings = {"batch_size": 5, "shuffle": True, "device": CPU, **options}
    if kind == "gpu":
        return GpuPhotoLoader(dataset, **{"decode": decode_on_cpu, **settings})
    return PhotoLoader(dataset, **settings)


@pytest.fixture
def silent():
    messages: list[str] = []
    return messages


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["rrc", "rrc-jitter-randaugment"])
def test_batches_are_those_of_the_data_set(image_dir, augmentation, num_workers):
    train = load(image_dir, augmentation=augmentation).train
    loader = make("cpu", train, num_workers=num_workers)
    order = loader.order(1)
    found = list(loader.epoch(1))
    loader.close()
    assert [len(labels) for _, labels in found] == [5, 5, 2]
    for b, (images, labels) in enumerate(found):
        expected, expected_labels = train.batch(order[5 * b : 5 * b + 5], seed=0, epoch=1)
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_file_order_and_shards(image_dir):
    test = load(image_dir).test
    alone = torch.cat([images for images, _ in make("cpu", test, shuffle=False).epoch(0)])
    ranks = [list(make("cpu", test, shuffle=False, batch_size=4, rank=r, world_size=2).epoch(0)) for r in range(2)]
    together = torch.cat([images for batches in zip(*ranks, strict=True) for images, _ in batches])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_reported_once_and_counted(image_dir, kind, num_workers):
    train = load(image_dir).train
    path = image_dir / "train" / "cat" / "2.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    told: list[str] = []
    loader = make(kind, train, num_workers=num_workers, report=told.append)
    for epoch in range(2):
        labels = torch.cat([labels for _, labels in loader.epoch(epoch)])
        assert sorted(labels.tolist()) == [0] * 6 + [1] * 4 + [2] * 2  # a cat stands for a cat
    loader.close()
    assert len(loader.broken) == 1
    (message,) = told
    assert str(path) in message and message.endswith("; another image stands in for it")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_broken_test_images_are_grey(image_dir, kind, capsys):
    test = load(image_dir).test
    (image_dir / "val" / "dog" / "0.jpg").write_bytes(b"")
    loader = make(kind, test, shuffle=False, batch_size=6)
    ((images, labels),) = loader.epoch(0)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images[2].abs().max() < 0.02 and images[3].abs().max() > 0.1
    assert capsys.readouterr().err == (f"warning: {image_dir}/val/dog/0.jpg: is empty; it is tested as plain grey\n")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_strict_data_set_stops(image_dir, kind, num_workers, data_error):
    train = load(image_dir, strict=True).train
    path = image_dir / "train" / "dog" / "0.jpg"
    path.unlink()
    loader = make(kind, train, num_workers=num_workers)
    with data_error(f"{path}: cannot be read (No such file or directory); replace or remove it"):
        list(loader.epoch(0))
    loader.close()
    assert not multiprocessing.active_children()


def test_too_many_broken_images_end_the_run(image_dir, data_error):
    train = load(image_dir).train
    broken = BrokenImages(len(train), train.stand_in, lambda _: None)
    broken.add(Broken(index, f"{index}.jpg: is empty") for index in range(100))
    broken.add([Broken(5, "5.jpg: is empty")])  # known already
    with data_error("101 of 12 images could not be read", "100.jpg: is empty", "shike_fast.data check"):
        broken.add([Broken(100, "100.jpg: is empty")])


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_loaders_tell_their_own_speed(image_dir, kind):
    loader = make(kind, load(image_dir).train)
    assert loader.images_per_second is None
    list(loader.epoch(0))
    assert loader.images_per_second > 0


def close_to(found: Tensor, expected: Tensor) -> None:
    """Within two grey levels: the resizing filters round differently, twice."""
    assert (found - expected).abs().max() <= 2.01 / 255 / 0.224
    assert (found != expected).float().mean() < 0.5


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_gpu_loader_gives_the_same_images(image_dir, part):
    """On the CPU with a decoder that gives the same pixels: windows, order, flips and labels are the same."""
    dataset = getattr(load(image_dir, augmentation="rrc"), part)
    pairs = zip(make("cpu", dataset).epoch(2), make("gpu", dataset).epoch(2), strict=True)
    for (expected, labels), (found, found_labels) in pairs:
        assert torch.equal(labels, found_labels)
        close_to(found, expected)


def test_the_gpu_decodes_plain_jpeg_only(image_dir):
    """PNG, CMYK and rotated images are decoded on the CPU, by the rules of all loaders."""
    asked = []

    def decode(encoded):
        asked.extend(bytes(data[:2].numpy()) for data in encoded)
        return decode_on_cpu(encoded)

    list(make("gpu", load(image_dir).train, decode=decode).epoch(0))
    assert asked == [b"\xff\xd8"] * 8  # of 12 images, four are PNG


def test_a_batch_that_the_gpu_refuses_is_decoded_on_the_cpu(image_dir):
    calls = itertools.count()

    def refuse(encoded):
        if next(calls) == 0:
            raise RuntimeError("nvjpegDecode failed: 5")
        return decode_on_cpu(encoded)

    train = load(image_dir, augmentation="rrc").train
    path = image_dir / "train" / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])  # looks like a JPEG, but is none: what such a failure is about
    told: list[str] = []
    loader = make("gpu", train, decode=refuse, batch_size=12, report=told.append)
    ((found, labels),) = loader.epoch(0)
    ((expected, expected_labels),) = make("cpu", train, batch_size=12, report=lambda _: None).epoch(0)
    assert torch.equal(labels, expected_labels) and len(told) == 1 and str(path) in told[0]
    close_to(found, expected)


def test_an_abandoned_epoch_ends_the_reading_threads(image_dir):
    loader = make("gpu", load(image_dir).train, batch_size=2)
    batches = iter(loader.epoch(0))
    next(batches)
    batches.close()
    assert len(list(loader.epoch(0, start_batch=4))) == 2


def test_without_a_gpu_there_is_no_hardware_decoder(image_dir):
    from shike_fast.data.images.gpu_decode import NoHardwareDecoderError

    with pytest.raises(NoHardwareDecoderError, match="cpu is no NVIDIA GPU"):
        GpuPhotoLoader(load(image_dir).train, batch_size=4, shuffle=True, device="cpu")


class Streams:
    """What the loaders use of torch.cuda, without a GPU: says what is made and in what order."""

    def __init__(self, monkeypatch):
        self.made = 0
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)

    def make(self, device):
        self.made += 1
        return self

    def record_event(self):
        return self.log[-1]

    def wait_event(self, event):
        self.log.append(f"wait for {event}")


class OnDevice:
    def record_stream(self, stream):
        stream.log.append("keep")


def test_all_epochs_of_a_loader_work_in_one_stream(monkeypatch):
    streams = Streams(monkeypatch)
    ahead = Prefetcher(torch.device("cuda"))

    def jobs():
        for number in range(3):
            yield lambda number=number: (streams.log.append(f"job {number}"), (OnDevice(),))[1]

    for _ in range(3):
        streams.log.clear()
        for _ in ahead(jobs()):
            streams.log.append("use")
        handed_over = [[f"wait for job {number}", "keep", "use"] for number in range(3)]
        assert streams.log == ["job 0", "job 1", *handed_over[0], "job 2", *handed_over[1], *handed_over[2]]
    abandoned = ahead(jobs())
    next(abandoned)
    next(ahead(jobs()))  # at the same time
    assert streams.made == 1


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_loaders_keep_their_stream(image_dir, kind):
    loader = make(kind, load(image_dir).train)
    before = loader._prefetch
    for epoch in range(2):
        list(loader.epoch(epoch))
    assert loader._prefetch is before and before._device == CPU


def test_page_locking_is_done_ahead_by_a_thread(monkeypatch):
    devices, copied = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(loader_module, "pin_memory", lambda batch: (copied.append(threading.get_ident()), batch)[1])
    assert list(loader_module._pinned(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert devices == [3] and len(set(copied)) == 1 and copied[0] != threading.get_ident()
    begun = loader_module._pinned(iter(range(5)))
    assert next(begun) == 0
    before = threading.active_count()
    begun.close()
    assert threading.active_count() == before - 1


def test_several_epochs_at_a_time_on_the_gpu_loader(image_dir):
    train = load(image_dir).train
    expected = [list(make("gpu", train).epoch(epoch)) for epoch in range(2)]
    loader = make("gpu", train)
    for pairs in zip(*(loader.epoch(epoch) for epoch in range(2)), strict=True):
        for epoch, (images, labels) in enumerate(pairs):
            other, other_labels = expected[epoch].pop(0)
            assert torch.equal(images, other) and torch.equal(labels, other_labels)


@pytest.mark.gpu
def test_memory_does_not_grow_from_epoch_to_epoch(image_dir):
    loader = make("cpu", load(image_dir, augmentation="rrc-jitter-randaugment").train, device=torch.device("cuda"))
    reserved = []
    for epoch in range(8):
        for images, _ in loader.epoch(epoch):
            images.sum()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["rrc", "rrc-jitter-randaugment"])
def test_batches_on_a_gpu_are_those_of_the_cpu(image_dir, augmentation):
    train = load(image_dir, augmentation=augmentation).train
    loaders = [make("cpu", train, num_workers=2, device=torch.device(name)) for name in ("cpu", "cuda")]
    for (expected, labels), (found, found_labels) in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert found.is_cuda and torch.equal(labels, found_labels.cpu())
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
    for loader in loaders:
        loader.close()


@pytest.mark.gpu
def test_the_hardware_decoder_gives_almost_the_same_images(image_dir):
    if importlib.util.find_spec("torchcodec") is None:
        pytest.importorskip("torchvision")
    train = load(image_dir, augmentation="rrc").train
    pairs = zip(
        PhotoLoader(train, batch_size=6, shuffle=True, device="cuda").epoch(0),
        GpuPhotoLoader(train, batch_size=6, shuffle=True, device="cuda").epoch(0),
        strict=True,
    )
    for (expected, labels), (found, found_labels) in pairs:
        assert torch.equal(labels, found_labels)
        assert (found - expected).abs().mean() < 0.1
