"""How a pack that is being made ends: killed, stopped, without room; and how it goes on."""

import contextlib
import errno
import fcntl
import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from programs import LIMIT

from shike_fast._util import files, processes
from shike_fast._util.cli import ArgumentParser, run_command
from shike_fast.data import load_dataset
from shike_fast.data.commands import pack as command
from shike_fast.data.images.decode import BrokenImageError
from shike_fast.data.images.stores import FileStore
from shike_fast.data.pack import writer
from shike_fast.errors import RunError

SETTINGS = ["--dataset", "imagefolder", "--short-side", "32", "--shard-images", "5", "--workers", "1"]


def pack(source, out, *options):
    """The exit status of the command."""
    parser = ArgumentParser(prog="pack")
    command.add_arguments(parser)
    arguments = parser.parse_args([*SETTINGS, "--data-dir", str(source), *options, str(out)])
    return run_command(lambda: command.run(arguments))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def start():
    """Starts the command in a separate process, which ends at the latest with the test."""
    started = []

    def start(source, out, *options):
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(pack(source, out, *options)))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exit_code(process):
    process.join(LIMIT)
    assert process.exitcode is not None, f"no end after {LIMIT:g} s"
    return process.exitcode


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
        return False


@pytest.fixture
def slow(monkeypatch, tmp_path):
    """Let workers stop at image 7 of the training images, as long as the command runs; each leaves its number here."""
    workers = tmp_path / "pids"
    workers.mkdir()
    read = FileStore.read

    def take_time(store, index):
        parent = os.getppid()
        (workers / str(os.getpid())).touch()
        while index >= 7 and os.getppid() == parent:
            time.sleep(0.01)
        return read(store, index)

    monkeypatch.setattr(FileStore, "read", take_time)
    return workers


def pids(folder):
    return [int(path.name) for path in folder.iterdir()]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_pack_goes_on_where_it_was(image_dir, tmp_path, start, slow, monkeypatch, workers):
    out = tmp_path / "pack"
    process = start(image_dir, out, "--workers", workers)
    wait_for(lambda: (out / "train-00000.npz").exists() and (out / ".train-00001.tar.tmp").exists())
    os.kill(process.pid, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    assert not (out / "pack.json").exists()
    before = (out / "train-00000.tar").stat()
    # At once, while workers may still be at it: they are waited for.
    monkeypatch.undo()
    encode = writer.encode_image
    log = tmp_path / "log"

    def count(store, index, settings):
        with open(log, "a") as file:
            file.write(f"{index}\n")
        return encode(store, index, settings)

    monkeypatch.setattr(writer, "encode_image", count)
    assert pack(image_dir, out, "--workers", workers) == 0
    after = (out / "train-00000.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    read = [int(line) for line in log.read_text().split()]
    assert len(read) == 18 - 5
    assert not [pid for pid in pids(slow) if running(pid)]
    pack(image_dir, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_that_are_not_what_their_description_says_are_made_again(image_dir, tmp_path, monkeypatch):
    out = tmp_path / "pack"
    finish = writer._finish
    monkeypatch.setattr(writer, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert pack(image_dir, out) == 128 + signal.SIGINT
    os.truncate(out / "train-00000.tar", 512)
    (out / "train-00001.tar").unlink()
    (out / "train-00002.npz").unlink()
    os.truncate(out / "test-00000.npz", 300)
    (out / "test-00001.npz").write_bytes(b"")
    monkeypatch.setattr(writer, "_finish", finish)
    assert pack(image_dir, out) == 0
    pack(image_dir, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_all_processes(image_dir, tmp_path, start, slow, number, name, capfd):
    out = tmp_path / "pack"
    process = start(image_dir, out, "--workers", "2")
    wait_for(lambda: len(pids(slow)) == 2 and (out / "train-00000.npz").exists())
    os.kill(process.pid, number)
    assert exit_code(process) == 128 + number
    assert not [pid for pid in pids(slow) if running(pid)]
    assert not list(out.glob(".*.tmp"))
    assert capfd.readouterr().err == f"error: stopped by {name}\n"


def test_a_worker_that_is_killed(image_dir, tmp_path, start, slow, capfd):
    out = tmp_path / "pack"
    process = start(image_dir, out, "--workers", "2")
    wait_for(lambda: len(pids(slow)) == 2 and (out / "train-00000.npz").exists())
    os.kill(pids(slow)[0], signal.SIGKILL)
    assert exit_code(process) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: a worker process ended early, by SIGKILL; if memory ran out use fewer --workers")
    assert not [pid for pid in pids(slow) if running(pid)]


@pytest.mark.parametrize("failing", [1, 3])
@pytest.mark.parametrize(("number", "remedy"), [(errno.EAGAIN, "ulimit -u"), (errno.ENOMEM, "use fewer --workers")])
def test_a_process_that_cannot_be_started(monkeypatch, failing, number, remedy):
    fork, calls = os.fork, itertools.count(1)

    def refuse():
        if next(calls) == failing:
            raise OSError(number, os.strerror(number))
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(
        RunError, match=rf"cannot start worker process {failing} of 3 .*{os.strerror(number)}.*{remedy}"
    ):
        processes.work(lambda task, tell: None, [1, 2, 3], 3, lambda: contextlib.nullcontext(print))
    assert not multiprocessing.active_children()


def test_what_a_worker_lacks_is_one_line(image_dir, tmp_path, monkeypatch, capfd):
    def refuse(path, content):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))

    out = tmp_path / "pack"
    write = writer.atomic_write
    monkeypatch.setattr(writer, "atomic_write", lambda p, c: (refuse if p.suffix == ".npz" else write)(p, c))
    assert pack(image_dir, out) == 1
    error = capfd.readouterr().err
    name = out / "train-00000.npz"
    assert error == f"error: cannot use {name} (File too large); raise the limit of file sizes (ulimit -f)\n"


def test_a_worker_that_is_killed_before_it_gets_its_first_task(monkeypatch):
    def killed(do, start=processes._start):
        pipe, process = start(do)
        process.kill()
        process.join()
        return pipe, process

    monkeypatch.setattr(processes, "_start", killed)
    with pytest.raises(RunError, match="a worker process ended early, by SIGKILL; if memory ran out"):
        processes.work(lambda task, tell: None, [1, 2], 2, lambda: contextlib.nullcontext(print))


def test_a_worker_that_is_killed_before_it_gets_another_task(monkeypatch):
    def one(pipe, parent):
        yield pipe.recv()
        os.kill(os.getpid(), signal.SIGKILL)  # it has asked for another one

    monkeypatch.setattr(processes, "_tasks", one)
    tell = lambda count, lines: wait_for(lambda: not multiprocessing.active_children())  # noqa: E731
    with pytest.raises(RunError, match="a worker process ended early, by SIGKILL; if memory ran out"):
        processes.work(lambda task, tell: None, [1, 2], 1, lambda: contextlib.nullcontext(tell))


def test_a_worker_with_a_fault_of_its_own(image_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(writer, "encode_image", lambda *_: 1 / 0)
    assert pack(image_dir, tmp_path / "pack") == 1
    error = capfd.readouterr().err
    assert "ZeroDivisionError" in error
    assert error.endswith("and repeat the command\n")
    assert "error: a worker process ended early, with status 1" in error


def test_memory_that_runs_out(image_dir, tmp_path, monkeypatch, failed):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(writer, "encode_image", fail)
    failed(pack(image_dir, tmp_path / "pack"), "out of memory; use fewer --workers", expected=1)


def fail_at(monkeypatch, wanted, number):
    """Let images called ``wanted``, or all of them, fail with an error of the system."""
    read = FileStore.read

    def fail(store, index):
        if wanted in store.name(index):
            cause = OSError(number, os.strerror(number))
            raise BrokenImageError(f"cannot be read ({cause.strerror})") from cause
        return read(store, index)

    monkeypatch.setattr(FileStore, "read", fail)


@pytest.mark.parametrize("options", [(), ("--strict",)])
def test_a_source_that_fails(image_dir, tmp_path, monkeypatch, options, failed):
    out = tmp_path / "pack"
    with monkeypatch.context() as patch:
        fail_at(patch, "dog/0.jpg", errno.EIO)
        name = image_dir / "train" / "dog" / "0.jpg"
        text = f"error: {name}: cannot be read (Input/output error); see to it, then repeat the command to go on"
        failed(pack(image_dir, out, *options), text, expected=1)
    assert (out / "train-00000.npz").exists()  # stays
    before = (out / "train-00000.tar").stat()
    assert pack(image_dir, out, *options) == 0
    assert (out / "train-00000.tar").stat().st_mtime_ns == before.st_mtime_ns
    pack(image_dir, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR])
def test_a_file_that_is_missing_is_left_out(image_dir, tmp_path, monkeypatch, number, capsys):
    fail_at(monkeypatch, "train/dog/0.jpg", number)
    assert pack(image_dir, tmp_path / "pack") == 0
    name = image_dir / "train" / "dog" / "0.jpg"
    assert capsys.readouterr().err == f"left out: {name}: cannot be read ({os.strerror(number)})\n"


def test_a_source_that_disappears(image_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pack"
    monkeypatch.setattr(writer, "most_broken", lambda _images: 3)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_REPORTS", 0)
        fail_at(patch, "train/cat/2.JPEG", errno.ENOENT)
        fail_at(patch, "train/dog", errno.ENOENT)
        assert pack(image_dir, out) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in error] == [*["left out"] * 4, "error"]
    first = image_dir / "train" / "cat" / "2.JPEG"
    assert error[-1] == (
        f"error: 4 of 12 train images could not be read so far, the first one being {first}: cannot be read (No such "
        "file or directory); look into it with: python -m shike_fast.data check, then repeat the command"
    )
    assert not (out / "pack.json").exists()
    assert pack(image_dir, out) == 0
    monkeypatch.undo()
    pack(image_dir, tmp_path / "whole")
    found, expected = (load_dataset("imagefolder", data_dir=folder) for folder in (out, tmp_path / "whole"))
    # What a finished shard left out stays left out.
    assert len(found.train) == len(expected.train) - 1


def interrupted(image_dir, out, monkeypatch):
    """A pack of which all is there but the end."""
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pack(image_dir, out) == 128 + signal.SIGINT


def test_what_finished_shards_left_out_counts(image_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pack"
    monkeypatch.setattr(writer, "most_broken", lambda _images: 3)
    fail_at(monkeypatch, "train/cat/0.jpg", errno.ENOENT)
    fail_at(monkeypatch, "train/dog", errno.ENOENT)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "most_broken", lambda _images: 100)
        interrupted(image_dir, out, patch)
    (out / "train-00001.npz").unlink()  # of which 4 are missing
    capsys.readouterr()
    assert pack(image_dir, out) == 2
    error = capsys.readouterr().err
    assert "error: 4 of 12 train images could not be read so far, the first one being train/cat/0.jpg: cannot" in error


def test_shards_that_leave_out_too_many_are_made_again(image_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pack"
    with monkeypatch.context() as patch:
        fail_at(patch, "train/cat", errno.ENOENT)  # five in the first shard, one in the second
        fail_at(patch, "val/cat/0", errno.ENOENT)
        interrupted(image_dir, out, patch)
    monkeypatch.setattr(writer, "most_broken", lambda _images: 3)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert pack(image_dir, out) == 0
    changed = [name for name, time in before.items() if (out / name).stat().st_mtime_ns != time]
    assert sorted(changed) == ["train-00000.tar", "train-00001.tar"]
    data = load_dataset("imagefolder", data_dir=out)
    assert (len(data.train), len(data.test)) == (12, 5)


def test_a_hundredth_of_a_part_may_be_left_out():
    def job(images):
        source = writer.Source(None, np.zeros(images, np.int64), None)
        return writer._Job(Path(), {"train": source}, None, False)

    assert [job(images).most_left_out("train") for images in (1, 10_099, 115_846)] == [100, 100, 1158]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("part", ["train", "val"])
def test_left_out_where_all_are_wanted(image_dir, tmp_path, monkeypatch, complete, part, failed, capsys):
    out = tmp_path / "pack"
    name = os.path.join(part, "cat", "1.png")
    (image_dir / name).write_bytes(b"")
    if complete:
        assert pack(image_dir, out) == 0
    else:
        interrupted(image_dir, out, monkeypatch)
    before = contents(out)
    capsys.readouterr()
    what = "a pack" if complete else "an unfinished pack"
    text = f"error: {out}: {what} without {name}: is empty: it was left out without --strict; replace it"
    failed(pack(image_dir, out, "--strict"), text)
    assert {name: content for name, content in contents(out).items() if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }
    assert pack(image_dir, out) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk(image_dir, tmp_path, monkeypatch, workers, failed):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "pack"
    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "close", lambda *_: full(0))
        failed(pack(image_dir, out, "--workers", workers), f"cannot write {out}", ".tar: No space left", expected=1)
    assert not list(out.glob(".*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        failed(pack(image_dir, out, "--workers", workers), f"cannot write {out}", "No space left", expected=1)
    assert pack(image_dir, out) == 0


def test_two_commands_do_not_pack_into_one_folder(image_dir, tmp_path, monkeypatch, failed):
    out = tmp_path / "pack"
    out.mkdir()
    with open(out / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(files, "_PATIENCE", 0.1)
        failed(pack(image_dir, out), f"{out}: another process is packing into this folder", expected=1)
    assert pack(image_dir, out) == 0


def test_a_pack_that_another_process_finished_meanwhile(image_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pack"
    pack(image_dir, out)
    complete = writer._is_complete
    answers = iter([lambda *_: False, complete])
    monkeypatch.setattr(writer, "_is_complete", lambda *a: next(answers)(*a))
    before = contents(out)
    capsys.readouterr()
    assert pack(image_dir, out) == 0
    assert capsys.readouterr().out == f"{out}: complete already\n"
    assert contents(out) == before
