import errno
import os
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from shike_fast.data import load_dataset
from shike_fast.data.__main__ import main
from shike_fast.data.commands.check import find_fault
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore


def check(root, *options, dataset="imagefolder"):
    return main(["check", "--dataset", dataset, "--data-dir", str(root), "--workers", "2", *options])


def spoil(image_dir):
    """One fault of each kind, two of the last."""
    (image_dir / "train" / "cat" / "lost.jpg").symlink_to(image_dir / "gone.jpg")
    (image_dir / "train" / "cat" / "0.jpg").write_bytes(b"")
    (image_dir / "train" / "dog" / "0.jpg").write_bytes(b"<html>404 Not Found</html>")
    for path in (image_dir / "train" / "eel" / "0.jpg", image_dir / "val" / "eel" / "1.png"):
        path.write_bytes(path.read_bytes()[:-30])
    return image_dir


def test_all_is_well(image_dir, capsys):
    assert check(image_dir) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"imagefolder in {image_dir}",
        "  training images        12",
        "  test images            6",
        "  classes                3",
        "  many / medium / few    0 / 0 / 3 classes",
        "  files OK               18 of 18",
    ]


@pytest.fixture
def spoilt(image_dir, monkeypatch):
    # imagefolder asks for the sizes of all files; what vanishes later is missing.
    spoil(image_dir)
    size = os.path.getsize
    monkeypatch.setattr(os.path, "getsize", lambda path: size(path) if os.path.exists(path) else 0)
    return image_dir


@pytest.mark.parametrize("options", [(), ("--decode",)])
def test_faults_are_named_with_their_reasons(spoilt, capsys, options):
    assert check(spoilt, *options) == 1
    printed = capsys.readouterr().out
    for line in (
        "  files OK               14 of 19",
        "missing: 1",
        f"  {spoilt}/train/cat/lost.jpg: cannot be read (No such file or directory)",
        "empty: 1",
        f"  {spoilt}/train/cat/0.jpg: is empty",
        "unreadable: 1",
        f"  {spoilt}/train/dog/0.jpg: cannot be decoded as an image (no image, or of a format that is not read here)",
        "truncated or damaged: 2",
        "faults in all: 5; to obtain the files again: --data-dir DIR with the images in DIR/train/CLASS",
    ):
        assert line in printed
    assert f"  {spoilt}/train/eel/0.jpg: cannot be decoded as an image (" in printed
    assert f"  {spoilt}/val/eel/1.png: cannot be decoded as an image (" in printed


def test_the_report_lists_every_fault(spoilt, tmp_path, capsys):
    report = tmp_path / "faults.txt"
    assert check(spoilt, "--report", str(report)) == 1
    rows = [line.split("\t") for line in report.read_text().splitlines()]
    assert [(kind, os.path.relpath(name, spoilt)) for kind, name, _ in rows] == [
        ("empty", "train/cat/0.jpg"),
        ("missing", "train/cat/lost.jpg"),
        ("unreadable", "train/dog/0.jpg"),
        ("truncated or damaged", "train/eel/0.jpg"),
        ("truncated or damaged", "val/eel/1.png"),
    ]
    assert rows[0][2] == "is empty"


def test_a_report_that_cannot_be_written_is_told_at_once(image_dir, capsys):
    assert check(image_dir, "--report", str(image_dir)) == 2
    assert capsys.readouterr().err == f"error: --report {image_dir}: cannot be written (Is a directory)\n"


def test_a_terminal_shows_twenty_of_a_kind(image_dir, tmp_path, capsys):
    for i in range(25):
        (image_dir / "train" / "dog" / f"empty{i:02d}.jpg").write_bytes(b"")
    report = tmp_path / "faults.txt"
    assert check(image_dir, "--report", str(report)) == 1
    printed = capsys.readouterr().out
    assert printed.count(": is empty\n") == 20
    assert "empty: 25\n" in printed
    assert "  … and 5 more; --all shows them, --report FILE writes them to a file\n" in printed
    assert len(report.read_text().splitlines()) == 25
    assert check(image_dir, "--all") == 1
    printed = capsys.readouterr().out
    assert printed.count(": is empty\n") == 25
    assert " more; " not in printed


def test_names_of_any_bytes(image_dir, tmp_path, capsys):
    name = image_dir / "train" / "cat" / os.fsdecode(b"caf\xe9\n\t.jpg")
    name.write_bytes(b"")
    report = tmp_path / "faults.txt"
    assert check(image_dir, "--report", str(report)) == 1
    shown = rf"{image_dir}/train/cat/caf\xe9\n\t.jpg"
    assert f"  {shown}: is empty\n" in capsys.readouterr().out
    assert report.read_text() == f"empty\t{shown}\tis empty\n"


def test_counts_against_the_published_ones(tmp_path, capsys):
    lists = {"train": [], "test": []}
    for part, label, count in (("train", 0, 3), ("train", 1, 2), ("test", 0, 1), ("test", 1, 1)):
        for i in range(count):
            path = f"{'train' if part == 'train' else 'val'}/n{label:08d}/{i}.JPEG"
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20)).save(tmp_path / path)
            lists[part].append(f"{path} {label}\n")
    for part, lines in lists.items():
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text("".join(lines))
    assert check(tmp_path, dataset="imagenet-lt") == 2
    assert "expected 115,846 images (published), got 5" in capsys.readouterr().err
    assert check(tmp_path, "--no-verify", dataset="imagenet-lt") == 0
    printed = capsys.readouterr().out
    assert "  training images        5  (published: 115,846)\n" in printed
    assert "  test images            2  (published: 50,000)\n" in printed
    assert "  classes                2  (published: 1,000)\n" in printed
    (tmp_path / "synthetic.json").write_text('{"like": "imagenet-lt", "classes": 2, "images": {"train": 5, "test": 2}}')
    (tmp_path / "val" / "n00000001" / "0.JPEG").unlink()
    assert check(tmp_path, dataset="imagenet-lt") == 1
    printed = capsys.readouterr().out
    assert "  training images        5  (generated: 5)\n" in printed
    assert "missing: 1\n" in printed
    assert "ImageNet (ILSVRC 2012" in printed


@pytest.fixture
def lists_of_shared_files(tmp_path):
    """Twenty-three listed training images in two files, one of which is a test image too."""
    for label in range(2):
        path = tmp_path / "train" / f"n{label:08d}" / "0.JPEG"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(path)
    first, second = "train/n00000000/0.JPEG 0\n", "train/n00000001/0.JPEG 1\n"
    (tmp_path / "ImageNet_LT_train.txt").write_text(22 * first + second)
    (tmp_path / "ImageNet_LT_test.txt").write_text(second)
    return tmp_path


def test_files_listed_more_than_once_are_named_but_no_fault(lists_of_shared_files, capsys):
    assert check(lists_of_shared_files, "--no-verify", dataset="imagenet-lt") == 0
    printed = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith("listed more than once: 2; "))
    assert printed[start + 1 :] == [f"  {lists_of_shared_files}/train/n0000000{label}/0.JPEG" for label in range(2)]


def test_a_terminal_shows_twenty_files_listed_more_than_once(tmp_path, capsys):
    folder = tmp_path / "train" / "n00000000"
    folder.mkdir(parents=True)
    lines = []
    for i in range(21):
        Image.new("RGB", (20, 20)).save(folder / f"{i:02d}.JPEG")
        lines.append(f"train/n00000000/{i:02d}.JPEG 0\n")
    for part in ("train", "test"):
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text("".join(lines))
    assert check(tmp_path, "--no-verify", dataset="imagenet-lt") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "  … and 1 more; --all shows them"
    assert printed[-2].endswith("/19.JPEG")
    assert check(tmp_path, "--no-verify", "--all", dataset="imagenet-lt") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/20.JPEG")


def test_images_in_memory_are_checked_by_reading_them(capsys):
    assert main(["check", "--dataset", "digits-lt"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("digits-lt\n  training images ")
    assert "kept in memory: reading them was the check" in printed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--dataset", "imagenet"], "error: unknown data set 'imagenet'"),
        (["--dataset", "imagefolder"], "error: imagefolder: needs --data-dir"),
        (["--dataset", "imagefolder", "--data-dir", "no/such"], "error: imagefolder: --data-dir no/such is not a"),
    ],
)
def test_bad_input(options, text, capsys):
    assert main(["check", *options]) == 2
    assert capsys.readouterr().err.startswith(text)


@pytest.mark.parametrize("workers", ["0", "two"])
def test_a_bad_number_of_workers(image_dir, workers, capsys):
    assert main(["check", "--dataset", "imagefolder", "--data-dir", str(image_dir), "--workers", workers]) == 2
    assert "--workers" in capsys.readouterr().err


class Verified:
    """A store that checks itself, as packs do."""

    left_out = ()

    def __init__(self, lines):
        self.lines = lines

    def __len__(self):
        return 5

    def verify(self, advance):
        advance(5)
        yield from self.lines


@pytest.mark.parametrize("lines", [[], [("a: b/train.bin", "damaged (SHA-256 1, expected 2); obtain it again")]])
def test_a_store_that_checks_itself(image_dir, tmp_path, capsys, monkeypatch, lines):
    def load(name, **options):
        data = load_dataset(name, **options)
        data.train.store, data.test.store = Verified(lines), Verified([])
        return data

    monkeypatch.setattr("shike_fast.data.commands.check.load_dataset", load)
    report = tmp_path / "faults.txt"
    assert check(image_dir, "--report", str(report)) == len(lines)
    assert report.read_text() == "".join(f"truncated or damaged\t{path}\t{reason}\n" for path, reason in lines)
    printed = capsys.readouterr().out
    if lines:
        assert "  a: b/train.bin: damaged (SHA-256 1, expected 2); obtain it again\n" in printed
        assert "faults in all: 1; to obtain the files again: pack the data set again" in printed
    else:
        assert "as they were written" in printed


def pack(image_dir, out):
    options = ["--dataset", "imagefolder", "--short-side", "32", "--workers", "1"]
    assert main(["pack", *options, "--data-dir", str(image_dir), str(out)]) == 0
    return out


def test_a_pack(image_dir, tmp_path, capsys):
    out = pack(image_dir, tmp_path / "a: b")
    capsys.readouterr()
    assert check(out) == check(out, "--decode") == 0
    assert capsys.readouterr().out.count("  files                  as they were written\n") == 2
    path = out / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert check(out) == 1
    printed = capsys.readouterr().out
    assert "truncated or damaged: 1\n" in printed
    assert f"  {path}: damaged (SHA-256 " in printed
    assert "as they were written" not in printed


def test_a_pack_tells_what_was_left_out(image_dir, tmp_path, capsys):
    for i in range(25):
        (image_dir / "train" / "dog" / f"empty{i:02d}.jpg").write_bytes(b"")
    name = os.fsdecode(b"caf\xe9\t.jpg")
    (image_dir / "val" / "cat" / name).write_bytes(b"no image")
    out = pack(image_dir, tmp_path / "pack")
    report = tmp_path / "left out.txt"
    capsys.readouterr()
    assert check(out, "--report", str(report)) == 1
    printed = capsys.readouterr().out
    assert "  training images        12\n" in printed
    assert "  files                  as they were written\n" in printed
    assert "left out when packed: 26\n" in printed
    assert "  train/dog/empty00.jpg: is empty\n" in printed
    assert printed.count(": is empty\n") == 20
    assert "  … and 6 more; --all shows them, --report FILE writes them to a file\n" in printed
    assert "faults in all: 26; to obtain the files again: replace in the source what was left out, and pack" in printed
    rows = report.read_text().splitlines()
    assert rows[0] == "left out when packed\ttrain/dog/empty00.jpg\tis empty"
    assert len(rows) == 26
    assert rows[-1].startswith(r"left out when packed	val/cat/caf\xe9\t.jpg".replace(r"packed\t", "packed\t"))
    assert check(out, "--all") == 1
    assert capsys.readouterr().out.count(": is empty\n") == 25


@pytest.fixture
def store(tmp_path):
    """``store(content)``: a store of one file."""

    def make(content):
        (tmp_path / "x.jpg").write_bytes(content)
        return FileStore(tmp_path, PathTable(["x.jpg"]))

    return make


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A photograph of more than 64 KiB in several formats."""
    folder = tmp_path_factory.mktemp("formats")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    for extension in ("jpg", "png", "webp", "bmp"):
        image.save(folder / f"x.{extension}")
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp"])
def test_whole_and_truncated_files_of_all_formats(store, encoded, extension, decode):
    content = encoded[extension]
    assert find_fault(store(content), 0, decode=decode) is None
    kind, reason = find_fault(store(content[: len(content) // 2]), 0, decode=decode)
    # Of WebP not even the beginning can be read then.
    assert kind == ("unreadable" if extension == "webp" else "truncated or damaged")
    assert "cannot be decoded" in reason


def test_whole_files_are_not_read_where_that_is_not_asked_for(store, encoded, monkeypatch):
    files = store(encoded["jpg"])
    monkeypatch.setattr(FileStore, "read", lambda self, index: pytest.fail("read"))
    assert find_fault(files, 0, decode=False) is None


def test_what_follows_the_end_marker(store, encoded):
    assert find_fault(store(encoded["jpg"] + bytes(10)), 0, decode=False) is None
    assert find_fault(store(encoded["jpg"] + bytes(1000)), 0, decode=False) is None  # decoding tells


def test_a_header_behind_long_comments(store, encoded):
    comment = b"\xff\xfe\xff\xff" + bytes(0xFFFD)
    content = encoded["jpg"]
    assert find_fault(store(content[:2] + 2 * comment + content[2:]), 0, decode=False) is None


def test_damage_between_beginning_and_end_is_found_by_decoding(store, encoded):
    content = bytearray(encoded["jpg"])
    content[50_000:51_000] = b"\xff\xc0" * 500
    assert find_fault(store(bytes(content)), 0, decode=False) is None
    assert find_fault(store(bytes(content)), 0, decode=True)[0] == "truncated or damaged"


@pytest.mark.parametrize("decode", [False, True])
def test_damage_that_decodes_to_wrong_pixels_is_not_found(store, encoded, decode):
    content = bytearray(encoded["jpg"])
    content[50_000:50_100] = bytes(100)
    files = store(bytes(content))
    assert find_fault(files, 0, decode=decode) is None
    assert (files.open(0).pixels() != store(encoded["jpg"]).open(0).pixels()).any()


def test_kinds_of_unreadable_files(tmp_path, store, encoded, monkeypatch):
    files = store(encoded["jpg"])

    def refuse(*_arguments, **_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert find_fault(files, 0, decode=False) == ("unreadable", "cannot be read (Permission denied)")
    monkeypatch.undo()
    (tmp_path / "x.jpg").unlink()
    (tmp_path / "x.jpg").mkdir()
    assert find_fault(files, 0, decode=False) == ("unreadable", "cannot be read (Is a directory)")
    os.mkfifo(tmp_path / "pipe.jpg")  # to open it would wait for a writer
    pipe = FileStore(tmp_path, PathTable(["pipe.jpg"]))
    assert find_fault(pipe, 0, decode=False) == ("unreadable", "is no regular file")
    below = FileStore(tmp_path, PathTable(["y/x.jpg"]))
    assert find_fault(below, 0, decode=False)[0] == "missing"
    (tmp_path / "y").write_bytes(b"")
    assert find_fault(below, 0, decode=False)[0] == "missing"


def test_a_closed_pipe_is_no_error(image_dir, monkeypatch, capsys):
    """``check … | head`` where head has gone already."""
    (image_dir / "train" / "dog" / "empty.jpg").write_bytes(b"")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:  # closing it flushes, as the end of a process does
        monkeypatch.setattr(sys, "stdout", pipe)
        assert check(image_dir) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


_SLOW = """
import os, sys, time
import shike_fast.data.commands.check as check
from shike_fast.data.__main__ import main
def wait(store, index, *, decode):
    os.write(1, b"started\\n")  # in one piece: print may write the end of the line by itself
    time.sleep(600)
check.find_fault = wait
sys.exit(main(["check", "--dataset", "imagefolder", "--data-dir", sys.argv[1], "--workers", "2"]))
"""


def test_ctrl_c_ends_all_processes(programs, image_dir):
    process = programs.start([sys.executable, "-c", _SLOW, image_dir])
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all of them
    done = programs.finish(process)  # ends when no process holds the pipes any more
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
