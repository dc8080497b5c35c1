import io
import os
import sys

import numpy as np
import pytest
from PIL import Image
from workers import assert_workers_read_the_same

from shike_fast.data import load_dataset

hf = pytest.importorskip("datasets")

NAMES = ("ant", "bee", "wasp")
COUNTS = (6, 4, 2)


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    """No progress bars, and a cache that is this test's own."""
    hf.disable_progress_bars()
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def encoded(label, number):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (60 * label, 20 * number, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(counts=COUNTS, labels=lambda c: c, label=None, *, path=True, first=0):
    pairs = [(c, i) for c, count in enumerate(counts) for i in range(first, first + count)]
    images = [{"bytes": encoded(c, i), "path": f"{c} {i}.png" if path else None} for c, i in pairs]
    features = hf.Features({"image": hf.Image(), "label": label or hf.ClassLabel(names=list(NAMES))})
    return hf.Dataset.from_dict({"image": images, "label": [labels(c) for c, _ in pairs]}, features=features)


def load(root, **options):
    return load_dataset("huggingface", data_dir=root, **{"image_size": 32, **options})


@pytest.fixture
def root(tmp_path):
    return tmp_path / "own"


def test_a_saved_data_set(root):
    dataset().save_to_disk(root)
    data = load(root, strict=True)
    assert (data.class_names, data.class_counts.tolist(), data.test.labels.tolist()) == (NAMES, [5, 3, 1], [0, 1, 2])
    assert data.validation.whole == 12
    for part in (data.train, data.test):
        for index in range(len(part)):
            name = os.path.relpath(part.store.name(index), root)
            label, number = name.removeprefix("train/").removesuffix(".png").split(" ")
            assert (part.labels[index], part.store.read(index)) == (int(label), encoded(int(label), int(number)))
    assert data.test[0][0].shape == (3, 32, 32)
    data.train.batch(np.arange(9), seed=0, epoch=0)


def test_the_choice_does_not_follow_the_order_where_files_have_names(root, tmp_path):
    dataset().save_to_disk(root)
    dataset().shuffle(seed=3).save_to_disk(tmp_path / "shuffled")
    assert set(load(root).validation.names) == set(load(tmp_path / "shuffled").validation.names)
    dataset(path=False).save_to_disk(tmp_path / "nameless")
    data = load(tmp_path / "nameless")
    assert data.class_counts.tolist() == [5, 3, 1]
    assert all(name.removeprefix(b"train/").isdigit() for name in data.validation.names)


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_a_dictionary_of_parts(root, name, data_error):
    parts = {"train": dataset(), name: dataset((2, 1), first=50)}
    hf.DatasetDict(parts if name == "test" else parts | {"test": dataset((1, 1, 1))}).save_to_disk(root)
    data = load(root)
    assert (data.validation, data.class_counts.tolist(), data.test.labels.tolist()) == (None, [6, 4, 2], [0, 0, 1])
    with data_error("--val-share:"):
        load(root, val_share=0.1)
    with data_error("--files: names Parquet files", "save_to_disk"):
        load(root, files="x")


def test_classes_without_images_and_a_test_set_without_labels(root):
    hf.DatasetDict({"train": dataset((4, 0, 2)), "test": dataset((3,), lambda c: -1)}).save_to_disk(root)
    data = load(root)
    assert (data.class_names, data.class_counts.tolist(), data.validation.whole) == (("ant", "wasp"), [3, 1], 6)
    assert data.notes == (
        "the test images have no labels and are not used",
        "1 of 3 classes have no images and are left out",
    )


def test_what_is_refused(root, tmp_path, data_error):
    hf.DatasetDict({"train": dataset((4, 0, 2)), "test": dataset((1, 1, 1))}).save_to_disk(root)
    with data_error("the class bee has validation images and none to train on"):
        load(root)
    dataset((2, 1, 1), lambda c: c - 1).save_to_disk(tmp_path / "unlabelled")
    with data_error("train: 2 images have no label, number 0 for example"):
        load(tmp_path / "unlabelled")
    other = dataset(label=hf.ClassLabel(names=["x", "y", "z"]))
    hf.DatasetDict({"train": dataset(), "test": other}).save_to_disk(tmp_path / "other")
    with data_error("test and train know different classes"):
        load(tmp_path / "other")
    hf.DatasetDict({"one": dataset(), "two": dataset()}).save_to_disk(tmp_path / "odd")
    with data_error("has no part called train, there is one, two"):
        load(tmp_path / "odd")
    dataset((3,)).save_to_disk(tmp_path / "single")
    with data_error("holds one class, ant; there must be two or more"):
        load(tmp_path / "single")
    dataset((0,)).save_to_disk(tmp_path / "empty")
    with data_error("empty: cannot be read by Hugging Face datasets"):
        load(tmp_path / "empty")
    (root / "dataset_dict.json").write_text("{")
    with data_error(f"{root}: cannot be read by Hugging Face datasets"):
        load(root)
    (tmp_path / "nothing").mkdir()
    with data_error("nothing: holds no saved data set, nor a Parquet file"):
        load(tmp_path / "nothing")


def test_other_labels_and_columns(root, tmp_path, data_error):
    dataset(labels=lambda c: f" {NAMES[c]} ", label=hf.Value("string")).save_to_disk(root)
    assert load(root).class_names == NAMES
    dataset(labels=lambda c: 5 * c, label=hf.Value("int16")).save_to_disk(tmp_path / "numbers")
    assert load(tmp_path / "numbers").class_names == ("0", "5", "10")
    two = dataset().add_column("species", ["x", "y"] * 6).add_column("photo", ["x"] * 12)
    two.save_to_disk(tmp_path / "two")
    assert load(tmp_path / "two").class_names == NAMES  # the only one that is a class label
    assert load(tmp_path / "two", label_column="species").class_names == ("x", "y")
    with data_error("column 'photo' holds Value", "where encoded images are expected"):
        load(tmp_path / "two", image_column="photo")
    with data_error("column 'image' holds Image", "where labels are expected"):
        load(tmp_path / "two", label_column="image")
    with data_error("no column is called 'kind'", "image, label, species, photo"):
        load(tmp_path / "two", label_column="kind")


def test_parquet_files(root, data_error):
    (root / "data").mkdir(parents=True)
    dataset().to_parquet(root / "data" / "train-00000-of-00001.parquet")
    data = load(root)
    assert (data.class_names, data.class_counts.tolist(), len(data.test)) == (NAMES, [5, 3, 1], 3)
    dataset((2, 1), first=50).to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    data = load(root)
    assert (data.class_counts.tolist(), data.test.labels.tolist()) == ([6, 4, 2], [0, 0, 1])
    named = load(root, files="data/train*", val_files="data/valid*")
    assert named.fingerprint == data.fingerprint
    (root / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with data_error(f"{root}: cannot be read by Hugging Face datasets"):
        load(root)


def test_parquet_that_another_program_wrote(root):
    """Bytes alone, of which nothing says that they are images."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root.mkdir()
    content = [encoded(c, i) for c in range(2) for i in range(3)]
    parquet.write_table(pa.table({"image": content, "label": ["b"] * 3 + ["a"] * 3}), root / "own.parquet")
    data = load(root, strict=True)
    assert (data.class_names, data.class_counts.tolist()) == (("a", "b"), [2, 2])
    assert data.train.store.read(0) in content
    with pytest.raises(IndexError):
        data.train[4]


def test_images_that_are_only_named(root, tmp_path, data_error):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])})
    table = {"image": [{"bytes": None, "path": str(tmp_path / "x.png")}] * 4, "label": [0, 0, 1, 1]}
    part = hf.Dataset.from_dict(table, features=features)
    root.mkdir()
    from pyarrow import parquet

    parquet.write_table(part.data.table, root / "own.parquet")
    with data_error("is not in the data set, which only names it"):
        load(root, strict=True).train[0]


def test_workers_read_the_same(root):
    dataset().save_to_disk(root)
    train = load(root, seed=1).train
    assert_workers_read_the_same(train)


def test_without_the_library(root, data_error, monkeypatch):
    root.mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with data_error("--dataset huggingface needs datasets: pip install datasets"):
        load(root)
