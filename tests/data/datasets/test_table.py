import csv
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from shike_fast.data import load_dataset

COUNTS = {"ant": 6, "bee": 4, "wasp": 2}


@pytest.fixture
def root(tmp_path):
    """12 images in DIR/photos, their paths and classes in DIR/labels.csv."""
    folder = tmp_path / "own"
    rows = []
    for label, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            path = folder / "photos" / f"{name} {i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (40 * label, 20 * i, 99)).save(path)
            rows.append((f"photos/{path.name}", name))
    write(folder / "labels.csv", [("path", "label"), *rows])
    return folder


def write(path, rows, delimiter=",", **options):
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, delimiter=delimiter, **options).writerows(rows)


def rows_of(root):
    with (root / "labels.csv").open(newline="") as file:
        return list(csv.reader(file))


def load(root, **options):
    return load_dataset("table", data_dir=root, **{"image_size": 32, **options})


def names(part, root):
    return [os.path.relpath(part.store.name(i), root) for i in range(len(part))]


def test_a_table_without_validation_images(root):
    data = load(root)
    assert data.class_names == ("ant", "bee", "wasp")
    assert (data.class_counts.tolist(), data.test.labels.tolist()) == ([5, 3, 1], [0, 1, 2])
    assert data.train[0][0].shape == (3, 32, 32)
    assert names(data.test, root) == [os.fsdecode(name) for name in data.validation.names]
    assert data.notes == ()
    assert load(root, seed=7).validation == data.validation
    write(root / "labels.csv", [rows_of(root)[0], *reversed(rows_of(root)[1:])])
    assert set(load(root).validation.names) == set(data.validation.names)
    assert load(root, split_seed=1).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("name", "delimiter", "options"),
    [
        ("labels.csv", ";", {}),
        ("LABELS.CSV", "\t", {}),
        ("labels.tsv", "\t", {"quoting": csv.QUOTE_ALL}),
        ("labels.csv", "|", {"lineterminator": "\n"}),
    ],
)
def test_delimiters_quotes_and_line_ends(root, name, delimiter, options):
    rows = rows_of(root)
    expected = load(root)
    (root / "labels.csv").unlink()
    write(root / name, rows, delimiter, **options)
    data = load(root)
    assert (data.fingerprint, data.validation) == (expected.fingerprint, expected.validation)


def test_what_spreadsheets_do(root):
    """Byte order marks, UTF-16, blanks, empty lines, and commas behind the last column."""
    expected = load(root).fingerprint
    text = (root / "labels.csv").read_text()
    padded = "\r\n\r\n".join(",".join(f" {field} " for field in row) + ",," for row in rows_of(root)[1:])
    for content in (
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"),
        text.replace("\r\n", "\r").encode(),
        f"path,label\r\n{padded}\r\n".encode(),
    ):
        (root / "labels.csv").write_bytes(content)
        assert load(root).fingerprint == expected


def test_quoted_paths_and_names_that_are_not_utf_8(root):
    odd = os.fsdecode(b'photos/a, "caf\xe9";\t.png')
    shutil.copy(root / "photos" / "ant 0.png", root / odd)
    write(root / "labels.csv", [*rows_of(root), (odd, os.fsdecode(b"\xe9e"))])
    data = load(root, val_share=0.01)
    assert data.class_names == ("ant", "bee", "wasp", "\\xe9e")
    assert names(data.train, root)[-1] == odd
    assert data.train[len(data.train) - 1][1] == 3


@pytest.mark.parametrize(
    ("labels", "classes", "note"),
    [
        (("0", "1", "2"), ("0", "1", "2"), None),
        (
            ("10", "9", "2"),
            ("2", "9", "10"),
            "labels are 3 of the numbers 2 to 10: classes are numbered 0 to 2 in their",
        ),
        (("1.0", "2.0", "03"), ("1", "2", "3"), "numbers 1 to 3"),
        (("-1", "0", "1"), ("-1", "0", "1"), "numbers -1 to 1"),
        (("2", "10", "x"), ("10", "2", "x"), None),
    ],
)
def test_labels_that_are_numbers(root, labels, classes, note):
    known = dict(zip(COUNTS, labels, strict=True))
    head, *rows = rows_of(root)
    write(root / "labels.csv", [head, *((path, known[label]) for path, label in rows)])
    data = load(root)
    assert data.class_names == classes
    assert sorted(data.class_counts.tolist()) == [1, 3, 5]
    assert [text for text in data.notes if note and note in text] if note else data.notes == ()


def test_a_split_column(root, data_error):
    head, *rows = rows_of(root)
    parts = ["Val", "train", "TEST", "train", "train", "train", "valid", "train", "train", "train", "train", "train"]
    write(root / "labels.csv", [(*head, "Split"), *((*row, part) for row, part in zip(rows, parts, strict=True))])
    data = load(root)
    assert (data.class_counts.tolist(), data.validation) == ([4, 3, 2], None)
    assert names(data.test, root) == ["photos/ant 0.png", "photos/bee 0.png"]  # val goes before test
    with data_error("--val-share:", "labels.csv has validation images"):
        load(root, val_share=0.2)
    with data_error("no column is called 'fold'", "path, label, Split", "--split-column"):
        load(root, split_column="fold")
    parts[1] = "later"
    write(root / "labels.csv", [(*head, "Split"), *((*row, part) for row, part in zip(rows, parts, strict=True))])
    with data_error("line 3: the split must be one of train", "got 'later'"):
        load(root)


def test_a_class_that_only_validation_has(root, data_error):
    head, *rows = rows_of(root)
    write(root / "labels.csv", [(*head, "split"), *((*row, "val" if row[1] == "bee" else "train") for row in rows)])
    with data_error("the class bee has validation images and none to train on"):
        load(root)
    write(root / "labels.csv", [(*head, "split"), *((*row, "val") for row in rows)])
    with data_error("has no training images"):
        load(root)


def test_two_tables(root, data_error):
    head, *rows = rows_of(root)
    write(root / "val.csv", [head, *rows[::4]])
    expected = load(root)
    (root / "labels.csv").rename(root / "train.csv")
    data = load(root)
    assert data.fingerprint == expected.fingerprint
    assert (data.class_counts.tolist(), data.test.labels.tolist()) == ([6, 4, 2], [0, 0, 1])
    assert data.notes == ("images in both parts, which flatters the accuracy: 3",)
    (root / "test.csv").write_text("passed over, as there is a val.csv")
    named = load(root, files="train.csv", val_files="val.csv")
    assert named.fingerprint == data.fingerprint
    with data_error("--val-files: ", "train.csv is one of --files as well"):
        load(root, files="train.csv", val_files="t*.csv")
    with data_error("--split-column:", "val.csv holds the validation images"):
        load(root, split_column="label")
    with data_error("--val-files: no file in", "matches 'other*.csv'"):
        load(root, files="train.csv", val_files="other*.csv")
    write(root / "val.csv", [head, (rows[0][0], "wasp")])
    with data_error("val.csv: line 2: 'photos/ant 0.png' has the label 'wasp'", "the label 'ant'"):
        load(root)


def test_several_tables(root, data_error):
    (root / "more").mkdir()
    shutil.copy(root / "labels.csv", root / "more" / "other.tsv")
    shutil.copy(root / "labels.csv", root / "._labels.csv")
    with data_error("table: several tables in", "labels.csv, more/other.tsv", "name one with --files"):
        load(root)
    assert len(load(root, files="labels.csv").train) == 9


@pytest.mark.parametrize(
    ("header", "options", "texts"),
    [
        (("file", "image", "label"), {}, ("more than one column may hold the paths", "--image-column", "file, image")),
        (("path", "class", "category"), {}, ("more than one column may hold the labels", "--label-column")),
        (("photos/a.png", "ant", ""), {}, ("no column has a usual name for the paths", "photos/a.png, ant")),
        (("path", "label", "x"), {"label_column": "kind"}, ("no column is called 'kind'", "path, label, x")),
        (("path", "label", "label"), {"label_column": "label"}, ("two columns are called 'label'",)),
    ],
)
def test_columns_that_cannot_be_told(root, data_error, header, options, texts):
    write(root / "labels.csv", [header, *((path, label, label) for path, label in rows_of(root)[1:])])
    with data_error(root / "labels.csv", *texts):
        load(root, **options)


def test_named_columns(root):
    expected = load(root).fingerprint
    write(root / "labels.csv", [("Kind of", "n", "Where"), *((b, 1, a) for a, b in rows_of(root)[1:])])
    assert load(root, image_column="Where", label_column="kind_of").fingerprint == expected


def test_paths_below_a_folder(root, data_error):
    expected = load(root).fingerprint
    head, *rows = rows_of(root)
    write(root / "labels.csv", [head, *((path.removeprefix("photos/"), label) for path, label in rows)])
    assert load(root, image_folder="photos").fingerprint == expected
    with data_error("table: the images of labels.csv are not in", "no ant 0.png"):
        load(root)
    with data_error("--image-folder: '../own' holds '..'"):
        load(root, image_folder="../own")


def test_absolute_paths_inside_and_outside(root, data_error):
    expected = load(root).fingerprint
    head, *rows = rows_of(root)
    write(root / "labels.csv", [head, *((root / path, label) for path, label in rows)])
    assert load(root).fingerprint == expected
    for path, fault in (("/etc/passwd", "is absolute"), ("../x.png", "holds '..'"), ("", "is empty"), ("a\0b", "NUL")):
        write(root / "labels.csv", [head, *rows, (path, "ant")])
        with data_error("line 14: the path", fault, "opens nothing outside --data-dir"):
            load(root)


def test_rows_that_repeat_others(root, data_error):
    expected = load(root)
    head, *rows = rows_of(root)
    write(root / "labels.csv", [head, *rows, rows[3], (f"./{rows[4][0]}", "ant")])
    data = load(root)
    assert data.fingerprint == expected.fingerprint
    assert data.notes == ("rows that repeat another one, and are passed over: 2",)
    write(root / "labels.csv", [head, *rows, (rows[3][0], "bee")])
    with data_error(
        "line 14: 'photos/ant 3.png' has the label 'bee', and the label 'ant' in", "labels.csv: line 5; keep one"
    ):
        load(root)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", ("is empty; its first line must name the columns",)),
        (b"\xef\xbb\xbf\r\n \r\n", ("is empty",)),
        (b"path,label\n", ("names no images",)),
        (b"path,label\nphotos/ant 0.png\n", ("line 2 has 1 field, the first line names 2", "double quotes")),
        (b"path,label\na,b.png,ant\n", ("line 2 has 3 fields, the first line names 2", "double quotes")),
        (b"path,label\n" + b"x," * 100_000 + b"x\n", ("line 2 has 100,001 fields, the first line names 2",)),
        (b'path,label\n"photos/ant 0.png,ant\n' + b"x,y\n" * 50_000, ("not a table of fields (field larger than",)),
        (b'path,label\n"photos/ant 0.png,ant\nx,y\n', ("line 3: not a table of fields (unexpected end",)),
        (b"path,label\na.png,\nphotos/bee 0.png, \nb.png,x\n", ("2 rows have no label, line 2 for example",)),
        (b"path,label\nphotos/ant 0.png,x\n", ("holds one class, x; there must be two or more",)),
    ],
)
def test_tables_that_are_refused(root, data_error, content, texts):
    (root / "labels.csv").write_bytes(content)
    with data_error(root / "labels.csv", *texts):
        load(root)


def test_no_table_and_a_folder_in_its_place(root, data_error):
    (root / "labels.csv").unlink()
    with data_error(f"{root}: holds no table (.csv, .tsv", "--files"):
        load(root)
    (root / "labels.csv").mkdir()
    with data_error("--files: no file in", "(a folder has that name)"):
        load(root, files="labels.csv")
    with data_error("--files: '/etc/*.csv' is absolute"):
        load(root, files="/etc/*.csv")


def test_files_that_are_missing_or_folders_are_broken_images(root, data_error):
    (root / "photos" / "ant 0.png").unlink()
    (root / "photos" / "bee 0.png").unlink()
    (root / "photos" / "bee 0.png").mkdir()
    data = load(root, strict=True, val_share=0.01, split_seed=3)
    listed = names(data.train, root)
    with data_error("ant 0.png: cannot be read (No such file"):
        data.train[listed.index("photos/ant 0.png")]
    with data_error("bee 0.png: cannot be read (Is a directory)"):
        data.train[listed.index("photos/bee 0.png")]


def test_a_long_tail_of_a_table(root):
    assert load(root, imbalance_factor=5).class_counts.tolist() == [5, 2, 1]
    data = load(root, imbalance_factor=2.5, long_tail="step")
    assert (data.class_counts.tolist(), data.imbalance_factor) == ([5, 3, 1], 2.5)


def test_a_parquet_table(root, data_error):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    _, *rows = rows_of(root)
    expected = load(root)
    (root / "labels.csv").unlink()
    paths, labels = zip(*rows, strict=True)
    path = root / "labels.parquet"
    for column in (pa.array(labels), pa.array(labels).dictionary_encode()):
        parquet.write_table(pa.table({"path": paths, "label": column}), path)
        data = load(root)
        assert (data.fingerprint, data.class_names) == (expected.fingerprint, expected.class_names)
    numbers = np.array([["ant", "bee", "wasp"].index(label) for label in labels]) * 2.0
    parquet.write_table(pa.table({"path": [p.encode() for p in paths], "label": numbers}), path)
    assert load(root).class_names == ("0", "2", "4")
    numbers[1] = np.nan
    parquet.write_table(pa.table({"path": paths, "label": numbers}), path)
    with data_error("labels.parquet: 1 row has no label, line 2"):
        load(root)
    parquet.write_table(pa.table({"path": [{"bytes": b"x"}] * 12, "label": labels}), path)
    with data_error("column 'path' holds a dict", "--dataset huggingface"):
        load(root)
    path.write_bytes(path.read_bytes()[:50])
    with data_error("labels.parquet: cannot be read as Parquet"):
        load(root)


def test_parquet_without_its_library(root, data_error, monkeypatch):
    (root / "labels.csv").rename(root / "labels.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with data_error("labels.parquet: Parquet needs pyarrow", "pip install pyarrow"):
        load(root)
