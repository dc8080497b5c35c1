import os

import numpy as np
import pytest

from shike_fast.data import datasets, load_dataset
from shike_fast.data.datasets.counts import expected_counts
from shike_fast.data.datasets.lists import class_folders, path_fault, read_list, read_names

JPEG = b"not looked at"


def write_list(path, content):
    path.write_bytes(content)
    return path


def test_paths_and_labels(tmp_path):
    images = read_list(write_list(tmp_path / "list.txt", b"train/a/1.jpg 3\ntrain/b/2.jpg 0\n"))
    assert [images.paths[i] for i in range(len(images))] == ["train/a/1.jpg", "train/b/2.jpg"]
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [3, 0]
    assert images.source == tmp_path / "list.txt"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"a/1.jpg 0\r\nb/2.jpg 1\r\n", [b"a/1.jpg", b"b/2.jpg"]),
        (b"a/1.jpg 0\nb/2.jpg 1", [b"a/1.jpg", b"b/2.jpg"]),
        (b"a/1.jpg 0\n\nb/2.jpg 1\n\n \n\r\n", [b"a/1.jpg", b"b/2.jpg"]),
        (b"\xef\xbb\xbfa/1.jpg 0\nb/2.jpg 1\n", [b"a/1.jpg", b"b/2.jpg"]),
        (b"a/1.jpg\t0\nb/2.jpg   1 \n", [b"a/1.jpg", b"b/2.jpg"]),
        (b"a b/x  y.jpg 0\nb/caf\xe9.jpg 1\n", [b"a b/x  y.jpg", b"b/caf\xe9.jpg"]),
        (b"a/1..2.jpg 0\n7 1\n", [b"a/1..2.jpg", b"7"]),
    ],
)
def test_odd_lines(tmp_path, content, names):
    images = read_list(write_list(tmp_path / "list.txt", content), 2)
    assert [images.paths.raw(i) for i in range(len(images))] == names
    assert images.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        (b"b.jpg", ["expected 'relative/path label', got 'b.jpg'"]),
        (b"b.jpg -1", ["got 'b.jpg -1'"]),
        (b"b.jpg 1.5", ["got 'b.jpg 1.5'"]),
        (b"b.jpg one", ["got 'b.jpg one'"]),
        (b"b\x00\x07.jpg", [r"got 'b\x00\x07.jpg'"]),
        (b"b.jpg 2", ["label 2 is outside 0 … 1"]),
        (b"b.jpg 99999", ["label 99999 is outside 0 … 1"]),
        (b"b.jpg " + b"9" * 5000, ["expected 'relative/path label'"]),
        (b"/etc/passwd 0", ["the path '/etc/passwd' is absolute", "below the data folder"]),
        (b"a/../../b.jpg 0", ["the path 'a/../../b.jpg' holds '..'"]),
        (b"a\x00b.jpg 0", ["holds a NUL byte"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, texts, data_error):
    path = write_list(tmp_path / "list.txt", b"a.jpg 0\n\n" + line + b"\nc.jpg 1\n")
    with data_error(f"{path}: line 3: ", "obtain the file again", *texts):
        read_list(path, 2)


def test_a_label_that_no_number_of_classes_allows(tmp_path, data_error):
    with data_error("line 1: label 2147483648 is outside"):
        read_list(write_list(tmp_path / "list.txt", b"a.jpg 2147483648\n"))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_list_without_images(tmp_path, content, data_error):
    with data_error(tmp_path / "list.txt", "names no images"):
        read_list(write_list(tmp_path / "list.txt", content))


def test_a_list_that_cannot_be_read(tmp_path, data_error):
    with data_error(f"{tmp_path}: cannot be read (Is a directory)"):
        read_list(tmp_path)


def test_paths_that_must_not_be_used():
    assert path_fault(b"a/b.jpg") is None
    assert path_fault(b"a/..b/c...jpg") is None
    assert path_fault(b" ") == "is empty"
    assert path_fault(b"..") == "holds '..'"


def test_class_folders(tmp_path, data_error):
    def folder_of(path):
        return path.split(b"/")[-2] if b"/" in path else None

    images = read_list(write_list(tmp_path / "a.txt", b"x/1 2\nz.jpg 1\ny/2 0\nx/3 2\n"))
    assert class_folders(images, 4, folder_of) == [b"y", None, b"x", None]
    images = read_list(write_list(tmp_path / "b.txt", b"x/1 2\ny/2 2\n"))
    with data_error(tmp_path / "b.txt", "'y/2' has label 2, whose other images are in the folder 'x'"):
        class_folders(images, 3, folder_of)
    images = read_list(write_list(tmp_path / "c.txt", b"x/1 2\nx/2 0\n"))
    with data_error(tmp_path / "c.txt", "the folder 'x' holds images of label 0 and of label 2"):
        class_folders(images, 3, folder_of)


def test_names_of_a_text_file(tmp_path, data_error):
    path = write_list(tmp_path / "names.txt", b"\xef\xbb\xbfa b\r\n\n caf\xe9\n")
    assert read_names(path) == ["a b", "caf\ufffd"]
    with data_error(tmp_path / "none.txt", "cannot be read"):
        read_names(tmp_path / "none.txt")


def test_published_counts():
    known = {name: info.counts for name, info in datasets().items() if info.counts is not None}
    assert {counts.kind for counts in known.values()} == {"published"}
    assert {name: (counts.classes, counts.images) for name, counts in known.items()} == {
        "inat18": (8142, {"train": 437_513, "test": 24_426}),
        "imagenet-lt": (1000, {"train": 115_846, "val": 20_000, "test": 50_000}),
        "places-lt": (365, {"train": 62_500, "val": 7_300, "test": 36_500}),
    }


def test_counts_of_a_generated_set(tmp_path):
    places = datasets()["places-lt"]
    assert expected_counts(places, tmp_path) is places.counts
    (tmp_path / "synthetic.json").write_text('{"like": "places-lt", "classes": 3, "images": {"train": 9, "test": 6}}')
    counts = expected_counts(places, tmp_path)
    assert (counts.classes, counts.images, counts.kind) == (3, {"train": 9, "test": 6}, "generated")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "does not describe a generated data set (Input data was truncated)"),
        ('{"like": "places-lt", "classes": 3}', "missing required field `images`"),
        ('{"like": "places-lt", "classes": "3", "images": {}}', "Expected `int`"),
        ('{"like": "places-lt", "classes": 3, "images": {"train": 2}}', "counts of train and test expected"),
        ('{"like": "places-lt", "classes": 1, "images": {"train": 2, "test": 2}}', "2 classes or more"),
        ('{"like": "inat18", "classes": 3, "images": {"train": 2, "test": 2}}', "use --dataset inat18"),
    ],
)
def test_a_damaged_description_of_a_generated_set(tmp_path, content, text, data_error):
    (tmp_path / "synthetic.json").write_text(content)
    with data_error(f"{tmp_path / 'synthetic.json'}: ", text):
        expected_counts(datasets()["places-lt"], tmp_path)


# What the list files of all data sets have in common, seen through one of them.


@pytest.fixture
def root(tmp_path):
    """Two classes, 3 + 1 training images and 2 test images, in the form of ImageNet-LT."""
    lists = {"train": [], "test": []}
    for part, label, number in [("train", 0, 0), ("train", 1, 1), ("train", 0, 2), ("train", 0, 3), ("test", 1, 4)]:
        folder = f"{'train' if part == 'train' else 'val'}/n0000000{label}"
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{number}.JPEG").write_bytes(JPEG)
        lists[part].append(f"{folder}/{number}.JPEG {label}\n")
    for part, lines in lists.items():
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text("".join(lines))
    (tmp_path / "synthetic.json").write_text('{"like": "imagenet-lt", "classes": 2, "images": {"train": 4, "test": 1}}')
    return tmp_path


def load(root, **options):
    return load_dataset("imagenet-lt", data_dir=root, **options)


def test_counts_are_verified(root, data_error):
    assert len(load(root).train) == 4
    (root / "synthetic.json").unlink()
    with data_error(root / "ImageNet_LT_train.txt", "expected 115,846 images (published), got 4", "--no-verify"):
        load(root)
    data = load(root, verify=False)
    assert (len(data.train), len(data.test), data.num_classes) == (4, 1, 2)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_list_that_lost_a_line(root, part, data_error):
    path = root / f"ImageNet_LT_{part}.txt"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    number = {"train": 4, "test": 1}[part]
    with data_error(path, f"expected {number} images (generated), got {number + 1}"):
        load(root)
    assert len(load(root, verify=False).train) == 4 + (part == "train")


def test_the_list_of_validation_images_is_checked_where_it_is_there(root, data_error):
    path = write_list(root / "ImageNet_LT_val.txt", b"train/n00000000/0.JPEG 2\n")
    with data_error(f"{path}: line 1: label 2 is outside 0 … 1"):
        load(root)
    path.write_bytes(b"train/n00000000/0.JPEG 1\n")
    text = (root / "synthetic.json").read_text()
    (root / "synthetic.json").write_text(text.replace('"train"', '"val": 3, "train"'))
    with data_error(path, "expected 3 images (generated), got 1"):
        load(root)
    assert len(load(root, verify=False).train) == 4


def test_a_class_without_training_images(root, data_error):
    path = root / "ImageNet_LT_train.txt"
    path.write_text(path.read_text().replace(" 1\n", " 0\n").replace("n00000001", "n00000000"))
    with data_error(path, "expected images of 2 classes (generated), got none of class 1"):
        load(root)


def test_without_verification_the_classes_are_those_that_occur(root, data_error):
    path = root / "ImageNet_LT_train.txt"
    path.write_text(path.read_text().replace(" 1\n", " 5\n"))
    test = root / "ImageNet_LT_test.txt"
    test.write_text(test.read_text().replace(" 1\n", " 5\n"))
    data = load(root, verify=False)
    assert data.class_counts.tolist() == [3, 0, 0, 0, 0, 1]
    assert data.class_names == ("n00000000", "class 0001", "class 0002", "class 0003", "class 0004", "n00000001")
    test.write_text(test.read_text().replace(" 5\n", " 6\n"))
    assert load(root, verify=False).class_counts.tolist() == [3, 0, 0, 0, 0, 1, 0]
    test.write_text(test.read_text().replace(" 6\n", " 2000000000\n"))
    with data_error(f"{test}: line 1: label 2000000000 is outside 0 … 999999"):
        load(root, verify=False)


def test_no_file_is_anywhere(root, data_error):
    os.rename(root / "val", root / "elsewhere")
    with data_error(
        "imagenet-lt: the images of ImageNet_LT_test.txt are not in",
        "no val/n00000001/4.JPEG",
        "looked for val/n00000001/4.JPEG, ILSVRC/Data/CLS-LOC/val/n00000001/4.JPEG, val/4.JPEG",
        "nor any other of 1 tried",
        "image-net.org",
    ):
        load(root)


def test_some_missing_files_do_not_matter_at_startup(root):
    (root / "train" / "n00000000" / "0.JPEG").unlink()
    assert load(root).train.store.name(1) == str(root / "train" / "n00000001" / "1.JPEG")


def test_not_every_file_is_looked_for(root, monkeypatch):
    lines = [f"train/n0000000{i % 2}/{i}.JPEG {i % 2}\n" for i in range(4000)]
    (root / "ImageNet_LT_train.txt").write_text("".join(lines))
    looked = []
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: looked.append(path) or exists(path))
    (root / "train" / "n00000001" / "3999.JPEG").write_bytes(JPEG)
    assert len(load(root, verify=False).train) == 4000
    assert len(looked) < 500


def test_the_fingerprint_is_the_list_wherever_the_files_lie(root):
    before = load(root).fingerprint
    (root / "ILSVRC" / "Data" / "CLS-LOC").mkdir(parents=True)
    for part in ("train", "val"):
        (root / part).rename(root / "ILSVRC" / "Data" / "CLS-LOC" / part)
    assert load(root).fingerprint == before
    path = root / "ImageNet_LT_train.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    assert load(root).fingerprint != before
