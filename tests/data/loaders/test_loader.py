import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch

from shike_fast.data import Loader, load_dataset
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.errors import DataError, RunError


def make(count=50, augmentation="crop-flip", side=8, seed=0):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return ArrayDataset(
        images, np.arange(count), mean=(0.5,) * 3, std=(0.25,) * 3, augmentation=augmentation, seed=seed
    )


class Troubled:
    """Sixteen samples; a batch that holds sample 9 meets the given trouble."""

    def __init__(self, trouble):
        self.labels = np.arange(16)
        self.seed = 0
        self.trouble = trouble

    def __len__(self):
        return 16

    def batch(self, indices, *, seed, epoch):
        if 9 in indices and epoch == 0:
            self.trouble()
        return torch.zeros(len(indices), 1, 1, 1), torch.from_numpy(self.labels[indices])


def broken_file():
    raise DataError("x.jpg: cannot be decoded; replace or remove it")


def bug():
    raise KeyError("a bug")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


def workers(loader):
    return [process.pid for process in loader._pool.processes]


def test_every_sample_once_an_epoch_in_a_new_order():
    loader = Loader(make(), batch_size=8, shuffle=True, seed=1)
    assert (len(loader.dataset), loader.batches_per_epoch) == (50, 7)
    orders = []
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert [len(labels) for _, labels in batches] == [8] * 6 + [2]
        assert all(images.shape == (len(labels), 3, 8, 8) for images, labels in batches)
        orders.append(torch.cat([labels for _, labels in batches]).tolist())
        assert sorted(orders[-1]) == list(range(50))
        assert orders[-1] == loader.order(epoch).tolist()
    assert len({tuple(order) for order in orders}) == 3


def test_file_order_without_shuffling():
    loader = Loader(make(), batch_size=20, shuffle=False)
    assert torch.cat([labels for _, labels in loader.epoch(3)]).tolist() == list(range(50))


def test_the_seed_of_the_loader_goes_before_that_of_the_data_set():
    own = list(Loader(make(seed=5), batch_size=50, shuffle=True).epoch(0))
    assert_same(list(Loader(make(seed=1), batch_size=50, shuffle=True, seed=5).epoch(0)), own)
    other = list(Loader(make(seed=5), batch_size=50, shuffle=True, seed=6).epoch(0))
    assert not torch.equal(other[0][1], own[0][1])


def test_a_sample_does_not_depend_on_its_batch():
    def samples(loader):
        return {int(y): x for images, labels in loader.epoch(2) for x, y in zip(images, labels, strict=True)}

    small = samples(Loader(make(), batch_size=3, shuffle=True))
    large = samples(Loader(make(), batch_size=50, shuffle=False))
    assert all(torch.equal(small[i], large[i]) for i in range(50))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("augmentation", ["crop-flip", "cifar"])
def test_workers_change_nothing(num_workers, augmentation):
    data = make(augmentation=augmentation)
    here = Loader(data, batch_size=8, shuffle=True, seed=4)
    there = Loader(data, batch_size=8, shuffle=True, seed=4, num_workers=num_workers)
    for epoch in (0, 1, 5):
        assert_same(list(there.epoch(epoch)), list(here.epoch(epoch)))
    there.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_start_batch_resumes_exactly(num_workers):
    loader = Loader(make(), batch_size=8, shuffle=True, seed=2, num_workers=num_workers)
    whole = list(loader.epoch(1))
    for start in (0, 3, 6, 7):
        rest = loader.epoch(1, start_batch=start)
        assert len(rest) == 7 - start
        assert_same(list(rest), whole[start:])
    loader.close()


def test_skipped_batches_are_not_loaded():
    asked = []

    class Recorder(ArrayDataset):
        def batch(self, indices, *, seed, epoch):
            asked.extend(indices)
            return super().batch(indices, seed=seed, epoch=epoch)

    source = make()
    loader = Loader(
        Recorder(source.images, source.labels, mean=(0.5,) * 3, std=(0.25,) * 3), batch_size=8, shuffle=True, seed=0
    )
    list(loader.epoch(0, start_batch=5))
    assert asked == loader.order(0)[40:].tolist()


def test_an_abandoned_epoch_leaves_no_trace_in_the_next():
    loader = Loader(make(400), batch_size=4, shuffle=True, seed=2, num_workers=2)
    expected = list(Loader(make(400), batch_size=4, shuffle=True, seed=2).epoch(1))
    for _ in zip(range(3), loader.epoch(0), strict=False):
        pass
    pids = workers(loader)
    assert_same(list(loader.epoch(1)), expected)
    assert workers(loader) == pids  # the same processes went on
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_does_not_advance_the_global_generators(num_workers):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = Loader(make(augmentation="cifar"), batch_size=8, shuffle=True, num_workers=num_workers)
    for epoch in range(2):
        list(loader.epoch(epoch))
    loader.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_close_ends_the_workers_and_the_loader_can_go_on():
    loader = Loader(make(), batch_size=8, shuffle=True, num_workers=2)
    first = list(loader.epoch(0))
    before = {child.pid for child in multiprocessing.active_children()}
    pids = set(workers(loader))
    assert pids <= before
    loader.close()
    assert not pids & {child.pid for child in multiprocessing.active_children()}
    loader.close()  # a second time is harmless
    assert_same(list(loader.epoch(0)), first)
    loader.close()


FORGETFUL = """
import numpy as np
from shike_fast.data import Loader
from shike_fast.data.images.arrays import ArrayDataset

images = np.zeros((8, 3, 4, 4), np.uint8)
dataset = ArrayDataset(images, np.arange(8), mean=(0.5,) * 3, std=(0.5,) * 3)
loader = Loader(dataset, batch_size=4, shuffle=True, num_workers=2)
print(len(list(loader.epoch(0))))
"""


def test_a_program_ends_that_does_not_close_its_loader(programs):
    done = programs.run([sys.executable, "-c", FORGETFUL])
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_more_workers_than_cores(recwarn, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    loader = Loader(make(), batch_size=8, shuffle=True, num_workers=2)
    assert len(list(loader.epoch(0))) == 7
    loader.close()
    assert not recwarn.list


def test_workers_survive_the_signals_that_stop_the_main_process():
    loader = Loader(make(4000), batch_size=20, shuffle=True, num_workers=2)
    batches = iter(loader.epoch(0))
    next(batches)
    pids = workers(loader)
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
    assert sum(1 for _ in batches) == 199
    assert workers(loader) == pids
    processes = loader._pool.processes
    loader.close()
    assert [process.exitcode for process in processes] == [0, 0]  # none that had to be killed


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_batch(world_size, num_workers):
    data = make(53)
    shared = {"batch_size": 8, "shuffle": True, "num_workers": num_workers, "world_size": world_size}
    loaders = [Loader(data, rank=rank, **shared) for rank in range(world_size)]
    assert all(loader.batches_per_epoch == len(loader.epoch(0)) == 7 for loader in loaders)
    for epoch, start in ((0, 0), (1, 3)):
        shares = [list(loader.epoch(epoch, start)) for loader in loaders]
        for batches in shares:
            assert all(8 // world_size <= len(labels) <= 8 // world_size + 1 for _, labels in batches[:-1])
        together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
        assert_same(together, list(Loader(data, batch_size=8, shuffle=True).epoch(epoch, start)))
    for loader in loaders:
        loader.close()


def test_a_share_of_nothing_is_left_out_at_the_end():
    batches = [
        [
            labels.tolist()
            for _, labels in Loader(make(9), batch_size=4, shuffle=False, rank=rank, world_size=3).epoch(0)
        ]
        for rank in range(3)
    ]
    assert batches == [[[0, 1], [4, 5], [8]], [[2], [6]], [[3], [7]]]
    loader = Loader(make(9), batch_size=4, shuffle=False, rank=1, world_size=3)
    assert loader.batches_per_epoch == 3
    assert [len(loader.epoch(0, start)) for start in range(4)] == [2, 1, 0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_error_keeps_its_one_line(num_workers, data_error):
    loader = Loader(Troubled(broken_file), batch_size=4, shuffle=False, num_workers=num_workers)
    batches = iter(loader.epoch(0))
    assert [next(batches)[1].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match=r"^x.jpg: cannot be decoded; replace or remove it$"):
        next(batches)
    assert len(list(loader.epoch(1))) == 4  # still usable
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bug_in_a_data_set_is_not_hidden(num_workers):
    loader = Loader(Troubled(bug), batch_size=4, shuffle=False, num_workers=num_workers)
    with pytest.raises(KeyError, match="a bug"):
        list(loader.epoch(0))
    loader.close()


def test_a_runtime_error_of_a_data_set_is_not_taken_for_a_dead_worker():
    def fail():
        raise RuntimeError("shapes differ")

    loader = Loader(Troubled(fail), batch_size=4, shuffle=False, num_workers=1)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(loader.epoch(0))
    loader.close()


def test_a_killed_worker_is_reported():
    loader = Loader(Troubled(die), batch_size=4, shuffle=False, num_workers=1)
    with pytest.raises(RunError, match=r"loader process \d+ ended early, by SIGKILL; .*use fewer --workers, or 0"):
        list(loader.epoch(0))
    assert multiprocessing.active_children() == []
    loader.close()


def test_a_real_data_set_through_workers(image_dir):
    data = load_dataset("imagefolder", data_dir=image_dir, image_size=24, seed=1)
    here, there = (Loader(data.train, batch_size=5, shuffle=True, num_workers=n) for n in (0, 2))
    assert_same(list(there.epoch(1)), list(here.epoch(1)))
    there.close()


def test_pin_memory_is_without_effect_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    images, labels = next(iter(Loader(make(), batch_size=8, shuffle=False, pin_memory=True).epoch(0)))
    assert not images.is_pinned()
    assert len(labels) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pin_memory_gives_page_locked_tensors(num_workers):
    loader = Loader(make(), batch_size=8, shuffle=False, pin_memory=True, num_workers=num_workers)
    for images, labels in loader.epoch(0):
        assert images.is_pinned()
        assert labels.is_pinned()
    loader.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -5}, "seed must be an integer"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": -1}, "rank must be from 0 to 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"world_size": 3}, "batches of 8 holds 2, too few for 3 processes; choose another batch size"),
        ({"batch_size": 2, "world_size": 3}, "batches of 2 holds 2, too few for 3 processes"),
    ],
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(make(), **{"batch_size": 8, "shuffle": True, **arguments})


@pytest.mark.parametrize(
    ("epoch", "start", "message"),
    [
        (-1, 0, "epoch must be"),
        (2**32, 0, "epoch must be"),
        (0, 8, "start_batch must be from 0 to 7"),
        (0, -1, "start_batch"),
    ],
)
def test_unusable_epochs(epoch, start, message):
    with pytest.raises(ValueError, match=message):
        Loader(make(), batch_size=8, shuffle=True).epoch(epoch, start)
