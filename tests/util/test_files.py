"""Files and locks on file systems that cannot do all that a local disk does."""

import errno
import os
import shutil
import stat

import pytest

from shike_fast import data
from shike_fast._util import files
from shike_fast.data.__main__ import main as data_command
from shike_fast.data.commands import check as check_command
from shike_fast.data.commands import pack as pack_command
from shike_fast.errors import ConfigError, RunError
from shike_fast.evaluate import main as evaluate_command
from shike_fast.predict import main as predict_command
from shike_fast.train import main as train_command

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]
SMALL = ["--model", "resnet8", "--epochs", "1", "--method", "ce", "--output-dir"]


def refusing(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def no_folders(number):
    """An fsync that does not flush folders."""
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    return fsync


def pack(images, out):
    return data_command(["pack", str(out), "--dataset", "imagefolder", "--data-dir", str(images), "--workers", "1"])


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("fcntl.flock", refusing(number))
    with open(tmp_path / ".lock", "w") as file:
        files.lock(file)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / '.lock'}: files cannot be locked here ({os.strerror(number)}); see to it that no other "
        "process writes to this folder\n"
    )


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_process_holds(tmp_path, monkeypatch, number):
    monkeypatch.setattr("fcntl.flock", refusing(number))
    with open(tmp_path / ".lock", "w") as file, pytest.raises(files.HeldElsewhereError):
        files.lock(file)


@pytest.mark.parametrize("missing", ["locks", "flushing of folders", "hard links"])
def test_commands_on_a_file_system_without(tmp_path, image_dir, monkeypatch, capsys, missing):
    if missing == "locks":
        monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    elif missing == "hard links":
        monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    else:
        monkeypatch.setattr(os, "fsync", no_folders(errno.EINVAL))
    assert train_command([*SMALL, str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "last.previous.pt").stat().st_size > 0
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert pack(image_dir, tmp_path / "pack") == 0
    assert capsys.readouterr().err.count("warning: ") == (2 if missing == "locks" else 0)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", no_folders(number))
    files.atomic_write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    monkeypatch.setattr(os, "fsync", no_folders(errno.EIO))
    with pytest.raises(RunError, match=r"cannot write .*file: Input/output error; see to the disk or choose another"):
        files.atomic_write(tmp_path / "file", b"content")


@pytest.mark.parametrize(
    ("number", "help_"),
    [
        (errno.ENOSPC, "make room or choose another folder"),
        (errno.EDQUOT, "make room or choose another folder"),
        (errno.EROFS, "choose a folder that can be written"),
        (errno.EPERM, "choose a folder that can be written"),
        (errno.EIO, "see to the disk or choose another folder"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch, call, number, help_):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, refusing(number))
    with pytest.raises(RunError) as caught:
        files.atomic_write(path, b"new")
    assert str(caught.value) == f"cannot write {path}: {os.strerror(number)}; {help_}"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_line_that_cannot_be_added_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC))
    with pytest.raises(RunError, match=rf"cannot write {tmp_path / 'x'}: No space left on device; make room"):
        files.append(tmp_path / "x", b"line\n")


def test_whatever_ends_a_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_copy_in_place_of_a_link_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    monkeypatch.setattr(shutil, "copyfileobj", refusing(errno.ENOSPC))
    (tmp_path / "file").write_bytes(b"old")
    keeping = files.replacing(tmp_path / "file", keep_previous_as=tmp_path / "previous")
    with pytest.raises(RunError, match=rf"cannot write {tmp_path / 'previous'}: No space left"), keeping as file:
        file.write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_why_a_folder_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    assert files.why_not_writable(tmp_path / "a" / "b") is None
    assert files.why_not_writable(tmp_path / "file" / "b") == "Not a directory"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert files.why_not_writable(tmp_path / "a" / "b") == "Permission denied"
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_file_is_checked_before_the_work(tmp_path, monkeypatch):
    def check(path):
        files.check_output_file("--csv", path, lambda path: path.read_bytes() == b"ours", "is not ours")

    (tmp_path / "ours").write_bytes(b"ours")
    (tmp_path / "other").write_bytes(b"other")
    os.mkfifo(tmp_path / "pipe")
    check(tmp_path / "ours")
    check(tmp_path / "new")
    for path, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "gone" / "x", "gone is not a folder; create it or name another file"),
        (tmp_path / "pipe", "pipe is no regular file; name one"),  # to open it would wait for a writer
        (tmp_path / "other", "other exists and is not ours; name another file"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"--csv: .*new cannot be written \(Permission denied\); name another file"):
        check(tmp_path / "new")


@pytest.mark.parametrize("command", ["train", "pack", "synth", "check", "evaluate", "predict"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, image_dir, monkeypatch, capsys, command):
    place = tmp_path / "place"
    place.mkdir()
    main, arguments = {
        "train": (train_command, ["--dataset", "imagefolder", "--data-dir", image_dir, "--output-dir", place / "run"]),
        "pack": (data_command, ["pack", place / "x", "--dataset", "imagefolder", "--data-dir", image_dir]),
        "synth": (data_command, ["synth", place / "x", "--like", "inat18", "--classes", 2, "--images", 4]),
        "check": (
            data_command,
            ["check", "--dataset", "imagefolder", "--data-dir", image_dir, "--report", place / "x"],
        ),
        "evaluate": (evaluate_command, ["--checkpoint", "gone.pt", "--csv", place / "x.csv"]),
        "predict": (predict_command, ["--checkpoint", "gone.pt", "--images", image_dir, "--output", place / "x.csv"]),
    }[command]

    def too_early(*_, **__):
        raise AssertionError

    for module in (data, check_command, pack_command):
        monkeypatch.setattr(module, "load_dataset", too_early)
    monkeypatch.setattr(os, "access", lambda path, mode: path != place)
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Permission denied" in error and str(place) in error and error.count("\n") == 1
    assert list(place.iterdir()) == []
