import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast._util.cli import ArgumentParser
from shike_fast.data import Loader, load_dataset
from shike_fast.data.commands import pack as command
from shike_fast.data.images.decode import BrokenImageError
from shike_fast.data.images.transforms import resize
from shike_fast.data.pack.format import Index
from shike_fast.data.pack.reader import PackStore, is_pack


def pack(source, out, *options):
    parser = ArgumentParser()
    command.add_arguments(parser)
    settings = ["--dataset", "imagefolder", "--short-side", "32", "--shard-images", "5", "--workers", "1"]
    assert command.run(parser.parse_args([*settings, "--data-dir", str(source), *options, str(out)])) == 0
    return out


def load(root, **options):
    return load_dataset("imagefolder", data_dir=root, **{"image_size": 32, **options})


@pytest.fixture
def out(image_dir, tmp_path):
    """The pack of ``image_dir``: shards of 5, 5 and 2 training images, of 5 and 1 test images."""
    return pack(image_dir, tmp_path / "pack")


@pytest.fixture
def raw(image_dir, tmp_path):
    return pack(image_dir, tmp_path / "raw", "--format", "raw")


def flip(path, place):
    """Change a byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def middle_of(store, index):
    return int(store.index.offset[index] + store.index.length[index] // 2)


def reduced(path):
    """What the raw pack of an image holds: uint8 [H, W, 3]."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    scale = 32 / min(height, width)
    if scale >= 1:
        return pixels
    return resize(pixels, max(32, int(width * scale)), max(32, int(height * scale))).transpose(1, 2, 0)


def test_a_pack_is_the_data_set_it_was_made_of(image_dir, out):
    source, packed = load(image_dir), load(out)
    assert packed.class_names == source.class_names
    assert packed.class_counts.tolist() == source.class_counts.tolist() == [6, 4, 2]
    assert packed.test.labels.tolist() == source.test.labels.tolist()
    assert (packed.name, packed.mean, packed.std) == (source.name, source.mean, source.std)
    assert packed.fingerprint != source.fingerprint  # its pixels are others
    names = [packed.train.store.names[i] for i in range(12)]
    assert [str(image_dir / name) for name in names] == [source.train.store.name(i) for i in range(12)]
    assert packed.train.store.name(6) == f"{out / 'train-00001.tar'}: {names[6]}"
    assert sorted(path.name for path in out.iterdir()) == [
        "pack.json",
        *("test-00000.tar", "test-00001.tar", "test.npz"),
        *("train-00000.tar", "train-00001.tar", "train-00002.tar", "train.npz"),
    ]


def test_raw_pixels_are_those_of_the_source_reduced_once(image_dir, raw):
    source, store = load(image_dir).train.store, load(raw).train.store
    for i in range(len(store)):
        expected = reduced(source.name(i))
        assert min(expected.shape[:2]) <= 32
        picture = store.open(i)
        assert (picture.height, picture.width) == expected.shape[:2]
        # The decoders of libjpeg-turbo and of Pillow's may differ by rounding.
        np.testing.assert_allclose(picture.pixels().astype(int), expected, atol=3 if i % 3 == 0 else 1)
        assert store.read(i) is None


def test_raw_pixels_are_not_copied(raw):
    store = load(raw).train.store
    pixels = store.open(3).pixels()
    assert np.shares_memory(pixels, np.frombuffer(store._maps[0], np.uint8))
    assert not pixels.flags.writeable


def test_jpeg_images_look_like_the_raw_ones(image_dir, raw, tmp_path):
    fine = pack(image_dir, tmp_path / "fine", "--quality", "95")
    found, expected = load(fine).test, load(raw).test
    for i in range(len(found)):
        difference = found.store.open(i).pixels().astype(int) - expected.store.open(i).pixels()
        assert np.abs(difference).mean() < 16  # the images are noise, which JPEG keeps badly
        assert isinstance(found.store.read(i), memoryview)


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_training_and_test_transforms(image_dir, tmp_path, form):
    data = load(pack(image_dir, tmp_path / form, "--format", form), augmentation="rrc-jitter", image_size=24, seed=3)
    images, labels = data.train.batch(np.array([7, 1, 7]), seed=3, epoch=0)
    assert images.shape == (3, 3, 24, 24)
    assert labels.tolist() == [1, 0, 1]
    assert torch.equal(images[1], data.train[1][0])
    plain = load(image_dir, augmentation="none", image_size=24)
    assert (data.test[5][0] - plain.test[5][0]).abs().mean() < 0.25


def test_raw_pixels_make_the_same_test_images(image_dir, raw):
    found, expected = (load(root, image_size=28).test for root in (raw, image_dir))  # whose short side is 32 as well
    for i in range(len(found)):
        assert torch.equal(found[i][0], expected[i][0])


def test_worker_processes_read_the_pack(out):
    data = load(out, augmentation="none")
    batches = list(Loader(data.test, batch_size=4, shuffle=False, num_workers=2).epoch(0))
    expected = torch.stack([data.test[i][0] for i in range(6)])
    torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), expected)


def test_a_store_goes_to_another_process_without_its_maps(out):
    store = load(out).train.store
    expected = bytes(store.read(4))
    assert bytes(pickle.loads(pickle.dumps(store)).read(4)) == expected


def test_long_tail_subset(image_dir, out):
    data = load(out, imbalance_factor=3)
    assert data.class_counts.tolist() == load(image_dir, imbalance_factor=3).class_counts.tolist() == [6, 3, 2]
    assert data.train.store.name(9).endswith("train-00002.tar: train/eel/0.jpg")
    assert data.fingerprint != load(out).fingerprint


def test_the_fingerprint_is_the_training_images(image_dir, out, tmp_path):
    assert load(pack(image_dir, tmp_path / "b", "--shard-images", "4")).fingerprint == load(out).fingerprint
    assert load(pack(image_dir, tmp_path / "c", "--quality", "80")).fingerprint != load(out).fingerprint


def test_any_tar_reads_the_shards_and_finds_a_folder_for_each_class(out):
    store = load(out).train.store
    contents = []
    for path in sorted(out.glob("train-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                contents.append((member.name, archive.extractfile(member).read()))
    assert [name for name, _ in contents] == [f"{store.labels[i]:05d}/{i:09d}.jpg" for i in range(12)]
    assert [content for _, content in contents] == [bytes(store.read(i)) for i in range(12)]


def test_names_that_are_not_utf_8(image_dir, tmp_path):
    name, broken = os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"\xe9.jpg")
    shutil.copy(image_dir / "train" / "cat" / "0.jpg", image_dir / "train" / "cat" / name)
    (image_dir / "train" / "cat" / broken).write_bytes(b"no image")
    (image_dir / "train" / "eel").rename(image_dir / "train" / os.fsdecode(b"h\xe9"))
    (image_dir / "val" / "eel").rename(image_dir / "val" / os.fsdecode(b"h\xe9"))
    out = pack(image_dir, tmp_path / "pack")
    data = load(out)
    assert f"train/cat/{name}" in [data.train.store.names[i] for i in range(7)]
    assert data.class_names == load(image_dir).class_names
    assert json.loads((out / "pack.json").read_text())["train"]["left_out"][0]["name"] == f"train/cat/{broken}"


def test_a_damaged_image_is_replaced_in_training_and_grey_in_tests(out):
    data = load(out)
    flip(out / "train-00001.tar", middle_of(data.train.store, 6))
    flip(out / "test-00000.tar", middle_of(data.test.store, 1))
    batch = data.train.pixels(np.array([6]), seed=0, epoch=0)
    (broken,) = batch.broken
    assert broken.index == 6
    assert broken.message.startswith(f"{out / 'train-00001.tar'}: train/dog/0.jpg: ")
    assert "train-00001.tar are damaged (wrong CRC-32)" in broken.message
    assert batch.labels.tolist() == [1]
    assert torch.equal(batch.pixels[0], data.train.pixels(np.array([6]), seed=0, epoch=0).pixels[0])
    assert [entry.index for entry in data.test.pixels(np.array([0, 1]), seed=0, epoch=0).broken] == [1]
    assert data.test[1][0].flatten(1).std(1).max() == 0


def test_a_damaged_image_is_an_error_where_all_are_wanted(raw, data_error):
    data = load(raw, strict=True)
    flip(raw / "train-00000.tar", middle_of(data.train.store, 2))
    data.train[3]
    with data_error(raw / "train-00000.tar", "train/cat/2.JPEG", "damaged (wrong CRC-32)"):
        data.train[2]


def test_verify_names_every_file_that_is_not_what_it_was(out):
    data = load(out)
    done = []
    assert list(data.train.store.verify(done.append)) == list(data.test.store.verify(done.append)) == []
    assert sum(done) == 18
    flip(out / "train-00001.tar", 3000)
    flip(out / "train.npz", 500)
    (out / "train-00002.tar").unlink()
    os.truncate(out / "test-00000.tar", 700)
    (out / "test-00001.tar").unlink()
    (out / "test-00001.tar").mkdir()
    done.clear()
    index, shard, missing = data.train.store.verify(done.append)
    paths = [str(out / name) for name in ("train.npz", "train-00001.tar", "train-00002.tar")]
    assert [index[0], shard[0], missing[0]] == paths
    assert index[1].startswith("damaged (SHA-256 ") and shard[1].startswith("damaged (SHA-256 ")
    assert missing[1].startswith("cannot be read (No such file or directory); copy it again")
    truncated, folder = data.test.store.verify(done.append)
    assert (truncated[0], folder[0]) == (str(out / "test-00000.tar"), str(out / "test-00001.tar"))
    assert truncated[1].startswith("has 700 bytes, expected ")
    assert sum(done) == 18


def test_verify_goes_on_after_a_file_that_cannot_be_read(out, monkeypatch):
    data = load(out)

    def fail(stream, _):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    lines = list(data.train.store.verify(lambda count: None))
    assert len(lines) == 4
    assert lines[2][0] == str(out / "train-00001.tar")
    assert lines[2][1].startswith("cannot be read (Input/output error); copy it again")


@pytest.mark.parametrize("name", ["train-00001.tar", "test-00000.tar", "train.npz", "test.npz"])
def test_a_missing_or_truncated_file_is_named(out, name, data_error):
    path = out / name
    os.truncate(path, 600)
    with data_error(f"{path}: has 600 bytes, expected", "copy it again"):
        load(out)
    path.unlink()
    with data_error(f"{path}: cannot be read (No such file or directory)", "copy it again"):
        load(out)


def test_a_shard_that_changed_since_the_pack_was_opened(out):
    data = load(out)
    path = out / "train-00000.tar"
    os.truncate(path, 700)
    with pytest.raises(BrokenImageError, match=r"train-00000.tar is not the \d+ bytes long that it was"):
        data.train.store.open(0)
    path.unlink()
    with pytest.raises(BrokenImageError, match=r"train-00000.tar cannot be read \(No such file or directory\)"):
        data.train.store.open(0)
    assert data.train.pixels(np.array([0]), seed=0, epoch=0).broken[-1].index == 4


def test_a_changed_index(out, data_error):
    flip(out / "train.npz", 200)
    with data_error(f"{out / 'train.npz'}: damaged", "pack.json"):
        load(out)


def rewrite(out, content, images=None):
    """Put another index in place of that of the training images, and say so in pack.json."""
    (out / "train.npz").write_bytes(content)
    manifest = json.loads((out / "pack.json").read_text())
    record = {"name": "train.npz", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["train"] |= {"index": record} | ({} if images is None else {"images": images})
    (out / "pack.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: {"shard": index.shard + np.uint32(1)},
        lambda index: {"offset": index.offset + 10**6},
        lambda index: {"offset": index.offset - 10**6},
        lambda index: {"length": -index.length},
        lambda index: {"crc32": index.crc32[:-1]},
        lambda index: {"name_bounds": index.name_bounds[::-1].copy()},
        lambda index: {"name_bytes": index.name_bytes[:-1]},
        lambda index: {"name_bounds": index.name_bounds[:0]},
        lambda index: {"width": index.width * 100},
        lambda index: {"width": -index.width, "height": -index.height},
        lambda index: {"width": np.zeros_like(index.width)},
        lambda index: {"width": np.full_like(index.width, 2**31 - 1), "height": np.full_like(index.height, 2**31 - 1)},
        lambda index: {"offset": np.full_like(index.offset, 2**63 - 1)},  # offset + length is negative
        lambda index: {"length": np.full_like(index.length, 2**63 - 1)},
    ],
)
def test_an_index_that_reaches_beyond_its_shards(raw, change, data_error):
    index = load(raw).train.store.index
    rewrite(raw, replace(index, **change(index)).encode())
    with data_error(f"{raw / 'train.npz'}: does not fit the shards", "pack the data set again"):
        load(raw)


def test_an_index_of_another_number_of_images_or_other_labels(out, data_error):
    index = load(out).train.store.index
    rewrite(out, index.encode(), images=11)
    with data_error(f"{out / 'train.npz'}: does not fit the shards"):
        load(out)
    rewrite(out, replace(index, label=index.label + 1).encode(), images=12)
    with data_error(f"{out / 'train.npz'}: label 3 of record 10 is outside 0 … 2"):
        load(out)


def test_an_index_that_is_none(out, data_error):
    index = load(out).train.store.index
    for content, reason in (
        (b"none", ""),
        (b"", ""),
        (replace(index, label=index.label.astype(float)).encode(), "label is float64 [12], expected int64 [N]"),
        (replace(index, crc32=index.crc32[:, None]).encode(), "crc32 is uint32 [12, 1]"),
        (index.encode()[:-40], ""),
    ):
        rewrite(out, content)
        with data_error(f"{out / 'train.npz'}: not the index of a pack", reason):
            load(out)
    other = io.BytesIO()
    np.savez(other, shard=index.shard)
    rewrite(out, other.getvalue())
    with data_error(f"{out / 'train.npz'}: not the index of a pack"):
        load(out)
    with pytest.raises(ValueError):
        Index.decode(pickle.dumps(index))


def test_a_pack_of_another_data_set(out, image_dir, data_error):
    for name in ("digits-lt", "cifar10-lt"):
        with data_error(out, "a pack of imagefolder", f"not of {name}"):
            load_dataset(name, data_dir=out)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"{}", b'"\xff"', b'{"version": 1}', b'{"version": 1, "settings": []}'),
        b'{"version": 1, "settings": ' + b'{"x":' * 100_000,
    ],
)
def test_a_damaged_description(out, content, data_error):
    (out / "pack.json").write_bytes(content)
    with data_error(f"{out / 'pack.json'}: does not describe a pack", "pack the data set again"):
        load(out)


def test_a_description_of_another_version_or_of_files_elsewhere(out, data_error):
    path = out / "pack.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 7}))
    with data_error(f"{path}: a pack of version 7, expected 1"):
        load(out)
    manifest["train"]["shards"][0]["name"] = "../train-00000.tar"
    path.write_text(json.dumps(manifest))
    with data_error(f"{path}: does not describe a pack", "train-00000.tar"):
        load(out)


def test_a_description_with_names_that_no_file_can_have(out, data_error):
    manifest = json.loads((out / "pack.json").read_text())
    manifest["test"]["left_out"] = [{"name": "\ud800", "reason": "is empty"}]
    (out / "pack.json").write_text(json.dumps(manifest))
    with data_error(f"{out / 'pack.json'}: does not describe a pack"):
        load(out)


def test_a_description_that_cannot_be_read(out, monkeypatch, data_error):
    path = out / "pack.json"
    monkeypatch.setattr(
        type(path), "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with data_error(f"{path}: cannot be read (Permission denied)"):
        load(out)


def test_an_unfinished_pack(out, data_error):
    (out / "pack.json").rename(out / "unfinished.json")
    assert is_pack(out)
    with data_error(f"{out}: an unfinished pack", "repeat the command"):
        load(out)


def test_other_folders_are_no_packs(image_dir, tmp_path):
    assert not is_pack(image_dir)
    assert not is_pack(tmp_path / "missing")


def test_an_image_store(out):
    store = load(out).train.store
    assert isinstance(store, PackStore)
    assert len(store) == 12
