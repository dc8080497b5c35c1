import gzip
import struct

import numpy as np
import pytest

from shike_fast.data import load_dataset
from shike_fast.data.datasets import fashion_mnist

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def load(folder, **options):
    return load_dataset("fashion-mnist-lt", data_dir=folder, **{"verify": False, "imbalance_factor": 10, **options})


def replace(folder, name, content):
    """Replace the compressed file by a plain one."""
    (folder / f"{name}.gz").unlink()
    (folder / name).write_bytes(content)


def plain(folder, name):
    return gzip.decompress((folder / f"{name}.gz").read_bytes())


def test_reads_the_four_files(fashion_dir):
    data = load(fashion_dir)
    counts = [int(30 * 0.1 ** (c / 9)) for c in range(10)]
    assert data.class_counts.tolist() == counts
    assert (data.in_channels, data.image_size, data.num_classes, len(data.test)) == (1, 28, 10, 20)
    # The first images of each class in file order: of class c, image j is number 10 · j + c.
    expected = [10 * j + c for c in range(10) for j in range(counts[c])]
    assert data.train.images[:, 0, 0, 0].tolist() == [i % 251 for i in expected]
    assert data.train.labels.tolist() == [i % 10 for i in expected]
    assert data.class_names[9] == "ankle boot"


def test_plain_files_serve_as_well(fashion_dir):
    expected = load(fashion_dir).fingerprint
    for name in (IMAGES, LABELS):
        replace(fashion_dir, name, plain(fashion_dir, name))
    assert load(fashion_dir).fingerprint == expected


def test_the_system_folder_is_the_default(fashion_dir, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", fashion_dir)
    assert len(load(None).test) == 20


@pytest.mark.parametrize("name", [IMAGES, LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_file_is_named_with_the_remedy(fashion_dir, name, data_error):
    (fashion_dir / f"{name}.gz").unlink()
    with data_error(name, fashion_dir, "apt-get install dataset-fashion-mnist", "--data-dir"):
        load(fashion_dir)


def test_the_exact_number_of_images_is_checked(fashion_dir, data_error):
    with data_error(fashion_dir / f"{IMAGES}.gz", "300 images, expected 60000"):
        load(fashion_dir, verify=True)


def test_truncated_compression(fashion_dir, data_error):
    path = fashion_dir / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with data_error(path, "truncated or damaged", "obtain the file again"):
        load(fashion_dir)


def test_damaged_compression(fashion_dir, data_error):
    path = fashion_dir / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # the checksum
    path.write_bytes(content)
    with data_error(path, "truncated or damaged"):
        load(fashion_dir)


def test_not_compressed_at_all(fashion_dir, data_error):
    path = fashion_dir / f"{LABELS}.gz"
    path.write_bytes(b"<html>not found</html>")
    with data_error(path, "truncated or damaged"):
        load(fashion_dir)


def test_an_unreadable_file(fashion_dir, monkeypatch, data_error):
    monkeypatch.setattr(fashion_mnist, "_find", lambda folder, name: folder)  # a folder cannot be read
    with data_error(fashion_dir, "cannot be read"):
        load(fashion_dir)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\0\0\x0d\x03" + content[4:],  # floats
        lambda content: b"\0\0\x08\x01" + content[4:],  # labels in place of images
        lambda content: content[:10],
        lambda content: b"",
    ],
)
def test_wrong_header(fashion_dir, change, data_error):
    replace(fashion_dir, IMAGES, change(plain(fashion_dir, IMAGES)))
    with data_error(fashion_dir / IMAGES, "not an IDX file"):
        load(fashion_dir)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x"])
def test_wrong_length(fashion_dir, change, data_error):
    replace(fashion_dir, IMAGES, change(plain(fashion_dir, IMAGES)))
    with data_error(fashion_dir / IMAGES, "bytes of data, expected 235200"):
        load(fashion_dir)


def test_a_header_beyond_64_bits(fashion_dir, data_error):
    replace(fashion_dir, IMAGES, bytes((0, 0, 8, 3)) + struct.pack(">3I", *[2**32 - 1] * 3))
    with data_error(fashion_dir / IMAGES, "0 bytes of data, expected 7922816"):
        load(fashion_dir)


def test_wrong_image_size(fashion_dir, idx_bytes, data_error):
    replace(fashion_dir, IMAGES, idx_bytes(np.zeros((300, 32, 32))))
    with data_error(fashion_dir / IMAGES, "32x32 pixels, expected 28x28"):
        load(fashion_dir)


def test_as_many_labels_as_images(fashion_dir, idx_bytes, data_error):
    replace(fashion_dir, LABELS, idx_bytes(np.zeros(299)))
    with data_error(fashion_dir / LABELS, "299 labels for the 300 images"):
        load(fashion_dir)


def test_label_out_of_range(fashion_dir, idx_bytes, data_error):
    labels = np.arange(300) % 10
    labels[17] = 10
    replace(fashion_dir, LABELS, idx_bytes(labels))
    with data_error(fashion_dir / LABELS, "label 10 of record 17 is outside 0 … 9"):
        load(fashion_dir)


def test_no_images_at_all(fashion_dir, idx_bytes, data_error):
    replace(fashion_dir, IMAGES, idx_bytes(np.zeros((0, 28, 28))))
    replace(fashion_dir, LABELS, idx_bytes(np.zeros(0)))
    with data_error("fashion-mnist-lt: there are no training images"):
        load(fashion_dir)


@pytest.mark.skipif(not fashion_mnist.SYSTEM_DIR.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_packaged_files():
    data = load_dataset("fashion-mnist-lt")
    assert data.class_counts.tolist() == [int(6000 * 0.01 ** (c / 9)) for c in range(10)]
    assert len(data.test) == 10_000
    everything = load_dataset("fashion-mnist-lt", imbalance_factor=1)
    histogram = np.bincount(everything.train.images.ravel(), minlength=256) / everything.train.images.size
    levels = np.arange(256) / 255
    mean = (histogram * levels).sum()
    assert mean == pytest.approx(data.mean[0], abs=1e-3)
    assert (histogram * (levels - mean) ** 2).sum() ** 0.5 == pytest.approx(data.std[0], abs=1e-3)
