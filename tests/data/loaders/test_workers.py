"""Loader processes: several epochs at a time, the ways in which one can fail, nothing that hangs or stays behind."""

import errno
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from shike_fast.data import Loader, load_dataset
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.data.loaders import messages
from shike_fast.data.loaders import workers as _workers
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.data.loaders.workers import LoadingStopped, WorkerPool
from shike_fast.errors import DataError, RunError


def never():
    return False


def arrays(count=40):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return ArrayDataset(images, np.arange(count), mean=(0.5,) * 3, std=(0.25,) * 3, augmentation="crop-flip", seed=0)


@pytest.fixture(params=["arrays", "files"])
def loader_of(request, image_dir):
    """Makes loaders of one data set, of either kind."""
    if request.param == "arrays":
        return functools.partial(Loader, arrays(), batch_size=4, shuffle=True)
    dataset = load_dataset("imagefolder", data_dir=image_dir, image_size=16).train
    return functools.partial(PhotoLoader, dataset, batch_size=2, shuffle=True, device="cpu")


def same(found, expected):
    return all(map(torch.equal, found, expected))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_epochs_at_the_same_time(loader_of, workers):
    """Three of them in turn, one of which is abandoned half-way and lives on; a fourth one in the middle of it all."""
    expected = [list(loader_of().epoch(epoch)) for epoch in range(4)]
    loader = loader_of(num_workers=workers)
    streams = [iter(loader.epoch(epoch)) for epoch in range(3)]
    for turn, batch in enumerate(expected[0]):
        for epoch in (0, 1, 2) if turn < 2 else (0, 2):
            assert same(next(streams[epoch]), expected[epoch][turn])
        if turn == 1:
            for found, batch in zip(loader.epoch(3), expected[3], strict=True):
                assert same(found, batch)
    assert [next(streams[epoch], None) for epoch in (0, 2)] == [None, None]
    assert same(next(streams[1]), expected[1][2])
    loader.close()
    assert not multiprocessing.active_children()


def test_abandoned_epochs_keep_nothing(loader_of):
    loader = loader_of(num_workers=2)
    for epoch in range(5):
        next(iter(loader.epoch(epoch)))
    assert len(list(loader.epoch(7))) == loader.batches_per_epoch
    assert loader._pool._answers == {}
    loader.close()


def test_an_epoch_of_a_closed_loader_says_so():
    loader = Loader(arrays(400), batch_size=4, shuffle=True, num_workers=1)
    batches = iter(loader.epoch(0))
    next(batches)
    loader.close()
    with pytest.raises(RunError, match="the loader was closed while an epoch of it was under way"):
        list(batches)


@pytest.mark.parametrize("failing", [1, 2, 4])
@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOMEM, "memory has run out"), (errno.EAGAIN, r"limit of processes \(ulimit -u")]
)
def test_a_process_that_cannot_be_started(monkeypatch, failing, number, remedy):
    fork, calls = os.fork, itertools.count(1)

    def refuse():
        if next(calls) == failing:
            raise OSError(number, os.strerror(number))
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    loader = Loader(arrays(), batch_size=4, shuffle=True, num_workers=4)
    with pytest.raises(RunError, match=f"cannot start loader process {failing} of 4 .*{os.strerror(number)}.*{remedy}"):
        next(iter(loader.epoch(0)))
    assert not multiprocessing.active_children()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(_workers.STOP_SIGNALS)
    assert len(list(loader.epoch(0))) == 10  # there is room again
    loader.close()


def test_no_descriptor_for_another_process(monkeypatch):
    pair, calls = messages.pair, itertools.count(1)

    def refuse():
        if next(calls) > 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return pair()

    monkeypatch.setattr(messages, "pair", refuse)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(RunError, match=r"cannot start loader process 2 of 3 \(Too many open files\); .*ulimit -n"):
        WorkerPool(abs, 3)
    assert not multiprocessing.active_children()
    assert sorted(os.listdir("/proc/self/fd")) == before


FAILING_START = """
import itertools, os, sys
from shike_fast import train
fork, calls = os.fork, itertools.count(1)

def refuse():
    if next(calls) > 1:
        raise OSError(12, "Cannot allocate memory")
    return fork()

os.fork = refuse
sys.exit(train.main(sys.argv[1:]))
"""


def settings(root, tmp_path, *options):
    words = "--dataset imagefolder --model resnet8 --image-size 16 --batch-size 4 --epochs 1 --method ce --threads 1"
    return [*words.split(), "--data-dir", root, "--output-dir", tmp_path / "run", *options]


def test_a_run_whose_processes_cannot_be_started_ends(image_dir, tmp_path):
    command = [sys.executable, "-c", FAILING_START, *settings(image_dir, tmp_path, "--workers", "2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot start loader process 2 of 2 (Cannot allocate memory); memory has")
    assert done.stderr.count("\n") == 1


CHOSEN_METHOD = """
import multiprocessing, sys
from shike_fast import train
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_whatever_start_method_the_program_prefers(image_dir, tmp_path, method):
    command = [sys.executable, "-c", CHOSEN_METHOD, method, *settings(image_dir, tmp_path, "--workers", "2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def small_shared_memory():
    """What makes a program see a /dev/shm of 64 KB; nothing where that is not allowed."""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    allowed = shutil.which("unshare") and subprocess.run([*mounted, "true"], capture_output=True).returncode == 0
    return mounted if allowed else []


SMALL_SHARED_MEMORY = """
import sys
from shike_fast.data import Loader, load_dataset
from shike_fast.data.loaders.photo import PhotoLoader
digits = Loader(load_dataset("digits-lt").train, batch_size=256, shuffle=True, num_workers=2)
files = load_dataset("imagefolder", data_dir=sys.argv[1], image_size=128).train
photos = PhotoLoader(files, batch_size=6, shuffle=True, device="cpu", num_workers=2)
print(*(len(list(loader.epoch(0))) == loader.batches_per_epoch for loader in (digits, photos)))
"""


def test_shared_memory_is_not_needed(image_dir):
    command = [*small_shared_memory(), sys.executable, "-c", SMALL_SHARED_MEMORY, image_dir]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")


def test_no_batch_goes_through_shared_memory(loader_of, monkeypatch):
    def refuse(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    for name in ("_new_shared", "_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse)
    loader = loader_of(num_workers=2)
    assert len(list(loader.epoch(0))) == loader.batches_per_epoch
    loader.close()


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOMEM, "memory has run out: use fewer --workers"), (errno.EFBIG, "ulimit -f")]
)
def test_a_batch_that_cannot_be_handed_over(monkeypatch, number, remedy):
    def refuse(file, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(messages, "_write", refuse)
    pool = WorkerPool(torch.zeros, 2)
    with pytest.raises(RunError, match=f"cannot hand over its batch .*{os.strerror(number)}.*; .*{remedy}"):
        list(pool.answers([3, 5, 100_000], never))
    assert [len(answer) for answer in pool.answers([3, 5], never)] == [3, 5]
    pool.close()


def test_a_batch_that_the_main_process_cannot_take(monkeypatch):
    pool = WorkerPool(torch.zeros, 1)
    receive = messages.receive

    def refuse(end):
        receive(end)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(messages, "receive", refuse)
    with pytest.raises(RunError, match=r"cannot take a batch from a loader process .*memory has run out"):
        list(pool.answers([3], never))
    assert not multiprocessing.active_children()


class OddError(Exception):
    """Is made of two things and keeps one text: pickle cannot make it anew."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("x.jpg: is empty"), DataError, "^x.jpg: is empty$"),
        (MemoryError(), RunError, r"out of memory in a loader process \(no details\); use fewer --workers"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), RunError, "out of memory in a loader"),
        (OSError(errno.EMFILE, "Too many open files"), RunError, "Too many open files.*ulimit -n"),
        (KeyError("a bug"), KeyError, "a bug"),
    ],
)
def test_errors_of_a_process(error, kind, text):
    pool = WorkerPool(fail, 1)
    with pytest.raises(kind, match=text):
        list(pool.answers([error], never))
    pool.close()


def test_errors_that_cannot_be_sent_are_told_in_full():
    def load(_):
        raise OddError("x", "why")

    pool = WorkerPool(load, 1)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*OddError: x: why"):
        list(pool.answers([0], never))
    pool.close()


def test_the_place_of_a_bug_is_told():
    pool = WorkerPool(lambda divisor: 1 / divisor, 1)
    with pytest.raises(ZeroDivisionError) as caught:
        list(pool.answers([0], never))
    assert "in <lambda>" in caught.value.__notes__[0] and __file__ in caught.value.__notes__[0]
    pool.close()


def test_answers_that_cannot_be_sent():
    pool = WorkerPool(lambda _: lambda: None, 1)
    with pytest.raises(Exception, match="pickle"):
        list(pool.answers([0], never))
    assert not pool.processes[0].exitcode
    pool.close()


def test_whoever_waits_for_a_batch_can_be_stopped(monkeypatch):
    monkeypatch.setattr(_workers, "_HEARTBEAT", 0.01)
    monkeypatch.setattr(_workers, "_PATIENCE", 0.01)
    pool = WorkerPool(time.sleep, 1)
    asked = itertools.count()
    with pytest.raises(LoadingStopped):
        list(pool.answers([3600], lambda: next(asked) == 3))
    (process,) = pool.processes
    pool.close()  # nor does closing wait for it
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("many", [3, 500])
def test_large_requests_and_answers_are_no_deadlock(many):
    """All that is sent before anything is received fits, whatever its size and the number of epochs."""
    rows = np.arange(5_000)
    pool = WorkerPool(lambda request: (request, "x" * 100_000), 1)
    streams = [pool.answers([rows] * 3, never) for _ in range(many // 50 + 1)]
    for _ in range(3):
        for stream in streams:
            found, text = next(stream)
            assert len(text) == 100_000 and np.array_equal(found, rows)
    pool.close()


ORPHANS = """
import os, sys, time
from shike_fast.data.loaders.workers import WorkerPool
pool = WorkerPool(abs, 3)
print(*(process.pid for process in pool.processes), flush=True)
time.sleep(3600)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_end_with_a_main_process_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        process.kill()
        process.wait()
        while any(map(alive, pids)):
            time.sleep(0.05)
