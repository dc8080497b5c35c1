import contextlib
import json
import os
import re
import sys

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from shike_fast._util import processes
from shike_fast._util.cli import ArgumentParser, run_command
from shike_fast.data import load_dataset
from shike_fast.data.commands import pack as command
from shike_fast.data.images.decode import BrokenImageError
from shike_fast.data.images.stores import FileStore
from shike_fast.data.pack import writer
from shike_fast.data.pack.format import Settings
from shike_fast.errors import DataError

SETTINGS = ["--dataset", "imagefolder", "--short-side", "32", "--shard-images", "5", "--workers", "1"]


def pack(source, out, *options):
    """The exit status of the command."""
    parser = ArgumentParser(prog="pack")
    command.add_arguments(parser)
    arguments = parser.parse_args([*SETTINGS, "--data-dir", str(source), *options, str(out)])
    return run_command(lambda: command.run(arguments))


def load(root, **options):
    return load_dataset("imagefolder", data_dir=root, **{"image_size": 32, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def photo(path, width, height, **options):
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.convert(options.pop("mode", "RGB")).save(path, **options)
    return path


def test_the_number_of_workers_changes_no_byte(image_dir, tmp_path, capsys):
    for workers in "123":
        assert pack(image_dir, tmp_path / workers, "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    output = capsys.readouterr()
    assert f"{tmp_path / '3'}: 12 training and 6 test images in 5 shards, 0.1 MB\n" in output.out
    assert output.err == ""


def test_where_the_source_lies_changes_no_byte(image_dir, tmp_path, monkeypatch):
    pack(image_dir, tmp_path / "a")
    monkeypatch.chdir(image_dir.rename(tmp_path / "elsewhere"))
    pack(".", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_process_for_each_cpu_is_the_default(image_dir, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(processes, "_start", lambda do, start=processes._start: started.append(1) or start(do))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", SETTINGS[:-2])
    pack(image_dir, tmp_path / "pack")
    assert len(started) == 3


def test_small_upright_jpeg_images_are_copied_byte_for_byte(image_dir, tmp_path):
    folder = image_dir / "train" / "cat"
    kept = [
        photo(folder / "a.jpg", 32, 40, quality=71),
        photo(folder / "b.jpg", 20, 90, mode="L"),
        photo(folder / "c.png", 31, 30, format="JPEG"),
        photo(folder / "d.jpg", 32, 32, exif=orientation(1)),
    ]
    encoded = [
        photo(folder / "e.jpg", 33, 40),
        photo(folder / "f.jpg", 20, 30, mode="CMYK"),
        photo(folder / "g.jpg", 20, 30, exif=orientation(6)),
        photo(folder / "h.png", 20, 30),
    ]
    (folder / "i.jpg").write_bytes(
        (folder / "d.jpg").read_bytes().replace(b"II*\0", b"II*\1").replace(b"MM\0*", b"MM\1*")
    )
    pack(image_dir, tmp_path / "pack")
    store = load(tmp_path / "pack").train.store
    packed = {store.names[i]: i for i in range(len(store))}
    for path in kept:
        index = packed[os.path.relpath(path, image_dir)]
        assert bytes(store.read(index)) == path.read_bytes()
        with Image.open(path) as image:
            assert (store.index.width[index], store.index.height[index]) == image.size
    for path in encoded:
        content = store.read(packed[os.path.relpath(path, image_dir)])
        assert bytes(content) != path.read_bytes()
        assert simplejpeg.decode_jpeg_header(content)[2:] == ("YCbCr", "420")


def test_a_name_of_two_lines_is_printed_in_one(image_dir, tmp_path, capsys):
    (image_dir / "train" / "cat" / "two\nlines.jpg").write_bytes(b"none")
    pack(image_dir, tmp_path / "pack")
    assert "two\\nlines.jpg: cannot be decoded as an image" in capsys.readouterr().err


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_sizes_and_exif(image_dir, tmp_path, form):
    sizes = {
        "a.jpg": ((320, 160), (64, 32)),
        "b.jpg": ((100, 333), (32, 106)),
        "c.jpg": ((33, 500), (32, 484)),
        "d.png": ((31, 200), (31, 200)),  # never enlarged
        "e.jpg": ((160, 320), (64, 32)),  # turned on its side
    }
    for name, (size, _) in sizes.items():
        exif = {"exif": orientation(6)} if name == "e.jpg" else {}
        photo(image_dir / "train" / "eel" / name, *size, **exif)
    pack(image_dir, tmp_path / "pack", "--format", form)
    store = load(tmp_path / "pack").train.store
    packed = {store.names[i]: i for i in range(len(store))}
    source = load(image_dir).train.store
    for index in range(len(store)):
        name = store.names[index].removeprefix("train/eel/")
        picture, original = store.open(index), source.open(index)
        assert (picture.width, picture.height) == (store.index.width[index], store.index.height[index])
        if name in sizes:
            assert (picture.width, picture.height) == sizes[name][1]
            assert (original.width > original.height) == (picture.width > picture.height)
            mean = original.pixels().astype(float).mean((0, 1)), picture.pixels().mean((0, 1))
            np.testing.assert_allclose(*mean, atol=3)
    assert packed["train/eel/e.jpg"] > 0


def test_raw_pixels_of_a_photograph_that_is_decoded_at_half_its_size(image_dir, tmp_path):
    noise = np.random.default_rng(1).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((1601, 1030), Image.Resampling.BICUBIC)
    image.save(image_dir / "val" / "cat" / "0.jpg")
    raw = tmp_path / "raw"
    pack(image_dir, raw, "--format", "raw", "--short-side", "256")
    found, expected = (load(root, image_size=224).test for root in (raw, image_dir))
    assert (found.store.index.width[0], found.store.index.height[0]) == (397, 256)
    pixels = [data.pixels(np.array([0]), seed=0, epoch=0).pixels.int() for data in (found, expected)]
    assert torch.equal(*pixels)


def test_images_that_cannot_be_read_are_left_out(image_dir, tmp_path, capsys):
    broken = [
        image_dir / "train" / "cat" / "1.png",
        image_dir / "train" / "dog" / "0.jpg",
        image_dir / "val" / "eel" / "0.jpg",
    ]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    (image_dir / "train" / "cat" / "0.jpg").write_bytes(b"")
    out = tmp_path / "pack"
    assert pack(image_dir, out, "--workers", "2") == 0
    output = capsys.readouterr()
    assert sorted(re.findall("left out: (.*?): ", output.err)) == sorted(
        map(str, [*broken, image_dir / "train/cat/0.jpg"])
    )
    assert "9 training and 5 test images" in output.out
    assert f"; 4 left out, listed in {out / 'pack.json'}" in output.out
    manifest = json.loads((out / "pack.json").read_text())
    assert manifest["train"]["left_out"][0] == {"name": "train/cat/0.jpg", "reason": "is empty"}
    assert [one["name"] for one in manifest["train"]["left_out"]] == [
        "train/cat/0.jpg",
        "train/cat/1.png",
        "train/dog/0.jpg",
    ]
    assert manifest["class_counts"] == [4, 3, 2]
    data = load(out)
    assert data.class_counts.tolist() == [4, 3, 2]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2]
    assert [data.train.store.names[i] for i in (0, 4)] == ["train/cat/2.JPEG", "train/dog/1.png"]
    assert list(data.train.store.verify(lambda count: None)) == []


def test_a_shard_without_a_readable_image(image_dir, tmp_path):
    for i in range(5):
        next((image_dir / "train" / "cat").glob(f"{i}.*")).write_bytes(b"none")
    assert pack(image_dir, tmp_path / "pack") == 0
    data = load(tmp_path / "pack")
    assert data.class_counts.tolist() == [1, 4, 2]
    done = []
    assert list(data.train.store.verify(done.append)) == []
    assert done == [0, 0, 5, 2]


def test_the_first_broken_image_is_an_error_where_all_are_wanted(image_dir, tmp_path, failed):
    path = image_dir / "train" / "dog" / "0.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    failed(pack(image_dir, tmp_path / "pack", "--strict"), path, "replace or remove it")
    assert not list((tmp_path / "pack").glob(".*.tmp"))
    path.write_bytes(content)
    pack(image_dir, tmp_path / "other")


@pytest.mark.parametrize(("part", "name"), [("train", "eel"), ("val", "cat")])
def test_a_class_of_which_nothing_is_left(image_dir, tmp_path, part, name, failed, capsys):
    folders = [image_dir / part / name] if part == "train" else list((image_dir / part).iterdir())
    for path in (path for folder in folders for path in folder.iterdir()):
        path.write_bytes(b"no image")
    status = pack(image_dir, tmp_path / "pack")
    error = capsys.readouterr().err
    assert status == 2
    kind = "train" if part == "train" else "test"
    assert f"none of the 2 {kind} images of class {name} can be read; repair them" in error
    assert not (tmp_path / "pack" / "pack.json").exists()


def test_an_image_too_long_for_jpeg(image_dir, tmp_path, capsys):
    Image.new("RGB", (70_000, 2)).save(image_dir / "train" / "cat" / "long.png")
    pack(image_dir, tmp_path / "pack")
    assert "long.png: has 70000 x 2 pixels, which no JPEG can hold" in capsys.readouterr().err
    pack(image_dir, tmp_path / "raw", "--format", "raw")
    assert load(tmp_path / "raw").train.store.index.width.max() == 70_000


def test_a_complete_pack_is_left_alone(image_dir, tmp_path, capsys):
    out = tmp_path / "pack"
    pack(image_dir, out)
    before = contents(out)
    (out / "train-00000.npz").write_bytes(b"left by a command that was killed while it tidied up")
    (out / "unfinished.json").write_bytes(b"{}")
    capsys.readouterr()
    assert pack(image_dir, out) == 0
    assert capsys.readouterr().out == f"{out}: complete already\n"
    assert contents(out) == before


def test_a_complete_pack_that_is_damaged(image_dir, tmp_path, failed, capsys):
    out = tmp_path / "pack"
    pack(image_dir, out)
    (out / "train-00001.tar").unlink()
    failed(pack(image_dir, out), out / "train-00001.tar", "copy it again")


OTHER = [
    (("--quality", "80"), "--quality 90, not 80"),
    (("--short-side", "31"), "--short-side 32, not 31"),
    (("--format", "raw"), "--format jpeg, not raw"),
    (("--shard-images", "6"), "--shard-images 5, not 6"),
]


@pytest.mark.parametrize("unfinished", [False, True])
def test_other_settings_or_another_source(image_dir, tmp_path, unfinished, failed):
    out = tmp_path / "pack"
    pack(image_dir, out)
    what = "a pack"
    if unfinished:
        what = "an unfinished pack"
        (out / "unfinished.json").write_text(json.dumps(json.loads((out / "pack.json").read_text())["settings"]))
        (out / "pack.json").unlink()
    before = contents(out)
    for options, text in OTHER:
        failed(pack(image_dir, out, *options), f"{out}: {what} with {text}; choose another folder")
    (image_dir / "val" / "eel" / "0.jpg").unlink()
    failed(pack(image_dir, out), f"{out}: {what} of other images than those of --data-dir")
    assert contents(out) == before


def test_a_damaged_description_of_an_unfinished_pack(image_dir, tmp_path, failed):
    out = tmp_path / "pack"
    out.mkdir()
    for content in (b"", b"{}", b"\xff"):
        (out / "unfinished.json").write_bytes(content)
        failed(pack(image_dir, out), f"{out / 'unfinished.json'}: damaged", f"delete {out}")


def test_a_place_that_is_taken(image_dir, tmp_path, failed):
    (tmp_path / "file").write_text("mine")
    failed(pack(image_dir, tmp_path / "file"), f"{tmp_path / 'file'}: is not a folder")
    below = tmp_path / "file" / "pack"
    failed(pack(image_dir, below), f"{below}: cannot be written (Not a directory); choose another folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    failed(pack(image_dir, tmp_path / "full"), f"{tmp_path / 'full'}: is not empty")
    for inside in (image_dir, image_dir / "train" / "pack"):
        failed(pack(image_dir, inside), f"{inside}: lies within --data-dir {image_dir}; choose a place outside")
    assert not (image_dir / "train" / "pack").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_one_that_is_still_to_be_made(image_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    assert pack(image_dir, tmp_path / "empty") == pack(image_dir, tmp_path / "a" / "b") == 0


def test_what_cannot_be_packed(image_dir, tmp_path, failed):
    out = tmp_path / "pack"
    failed(
        pack(image_dir, out, "--dataset", "digits-lt"), "digits-lt: its images are kept in memory", "nothing to pack"
    )
    failed(pack(image_dir, out, "--dataset", "nothing"), "unknown data set 'nothing'")
    failed(pack(image_dir / "train" / "cat", out), "no class folders")
    failed(pack(image_dir, out, "--format", "raw", "--quality", "3"), "--quality: raw pixels have none")
    assert not out.exists()
    assert pack(image_dir, out) == 0
    failed(pack(out, tmp_path / "again"), f"--data-dir {out}: a pack already")


def test_data_without_files(image_dir, tmp_path, monkeypatch, failed):
    monkeypatch.setattr(command, "load_dataset", lambda *_, **__: load_dataset("digits-lt"))
    failed(pack(image_dir, tmp_path / "pack"), "digits-lt: its images are kept in memory")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--quality", "0"), "argument --quality: must be 1 … 100, got 0"),
        (("--quality", "101"), "must be 1 … 100, got 101"),
        (("--workers", "0"), "argument --workers: must be at least 1, got 0"),
        (("--short-side", "x"), "argument --short-side: invalid whole number value: 'x'"),
        (("--shard-images", "-1"), "must be at least 1"),
        (("--format", "png"), "invalid choice: 'png'"),
    ],
)
def test_unusable_options(image_dir, tmp_path, options, text, failed):
    with pytest.raises(SystemExit) as end:
        pack(image_dir, tmp_path / "pack", *options)
    failed(end.value.code, text)


def test_the_published_number_of_records_is_checked_unless_told_otherwise(image_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "load_dataset", lambda *a, **k: asked.append(k["verify"]) or load_dataset(*a, **k))
    pack(image_dir, tmp_path / "a")
    pack(image_dir, tmp_path / "b", "--no-verify")
    assert asked == [True, False]


def test_the_bar_counts_images(image_dir, tmp_path, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def bar(description, total):
        seen.append((description, total))
        yield seen.append

    monkeypatch.setattr(writer, "progress", bar)
    monkeypatch.setattr(processes, "_REPORTS", 0)
    (image_dir / "train" / "cat" / "0.jpg").write_bytes(b"")
    pack(image_dir, tmp_path / "pack", "--workers", "2")
    assert seen[0] == ("packing", 18)
    assert sum(seen[1:]) == 18


def test_an_image_of_a_store_without_bytes(image_dir):
    """Stores of pixels have none."""
    store = load(image_dir).train.store

    class Pixels(FileStore):
        def read(self, index):
            return None

        def open(self, index):
            return store.open(index)

    settings = Settings("x", 32, "jpeg", 90, 5, "")
    content, width, height = writer.encode_image(Pixels(store.root, store.paths), 0, settings)
    assert simplejpeg.decode_jpeg_header(content)[:2] == (height, width)
    (image_dir / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(BrokenImageError, match="No such file"):
        writer.encode_image(store, 0, settings)


def test_what_was_left_out_is_said_whenever_the_pack_is_loaded(image_dir, tmp_path, capsys):
    (image_dir / "val" / "cat" / "0.jpg").write_bytes(b"")
    out = tmp_path / "pack"
    assert pack(image_dir, out) == 0
    capsys.readouterr()
    assert len(load(out).test) == 5
    assert capsys.readouterr().err == (
        f"warning: {out}: 1 of 6 test images could not be read when it was packed, and are not in it; "
        "python -m shike_fast.data check names them\n"
    )


def test_a_pack_that_lost_its_description(image_dir, tmp_path):
    out = tmp_path / "pack"
    assert pack(image_dir, out) == 0
    (out / "pack.json").unlink()
    with pytest.raises(DataError, match=r"pack: a pack without its pack\.json"):
        load(out)
