import io
import json
import os
import tarfile

import pytest
from PIL import Image
from workers import assert_workers_read_the_same

from shike_fast.data import load_dataset

COUNTS = (6, 4, 2)


def encoded(label, number):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (60 * label, 20 * number, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def members(part=0, label=str, extension="cls"):
    """Those of the samples with numbers ``part`` modulo 3."""
    found = []
    for c, count in enumerate(COUNTS):
        for i in range(part, count, 3):
            found += [(f"{c}/{i}.PNG", encoded(c, i)), (f"{c}/{i}.{extension}", label(c).encode())]
    return found


@pytest.fixture
def root(tmp_path):
    """12 images in three archives."""
    for part in range(3):
        write(tmp_path / "own" / f"shard-{part}.tar", members(part))
    return tmp_path / "own"


def load(root, **options):
    return load_dataset("webdataset", data_dir=root, **{"image_size": 32, "augmentation": "none", **options})


def names(part, root):
    return [os.path.relpath(part.store.name(i), root) for i in range(len(part))]


def test_archives_without_validation_images(root):
    data = load(root, strict=True)
    assert (data.class_names, data.class_counts.tolist()) == (("0", "1", "2"), [5, 3, 1])
    assert (len(data.test), data.validation.whole) == (3, 12)
    assert names(data.test, root) == [os.fsdecode(name) for name in data.validation.names]
    for part in (data.train, data.test):
        for index, name in enumerate(names(part, root)):
            label, number = name.removesuffix(".PNG").split("/")[1:]
            assert (part.labels[index], part.store.read(index)) == (int(label), encoded(int(label), int(number)))


def test_the_parts_by_name_or_folder_or_pattern(root):
    (root / "shard-2.tar").rename(root / "val-2.tar")
    data = load(root)
    assert (data.validation, data.class_counts.tolist(), data.test.labels.tolist()) == (None, [4, 3, 2], [0, 0, 1])
    for name in ("train-0.tar", "train-1.TAR"):
        (root / f"shard-{name[6]}.tar").rename(root / name)
    assert load(root).class_counts.tolist() == [4, 3, 2]
    (root / "valid").mkdir()
    (root / "val-2.tar").rename(root / "valid" / "2.tar")
    assert load(root).test.labels.tolist() == [0, 0, 1]
    assert load(root, files="*.[tT]*", val_files="valid/*").test.labels.tolist() == [0, 0, 1]
    assert load(root, val_files="train-1.TAR").class_counts.tolist() == [4, 3, 1]


def test_archives_that_cannot_be_told_apart(root, data_error):
    (root / "shard-0.tar").rename(root / "train-0.tar")
    with data_error("which archive holds the training images? There is shard-1.tar, shard-2.tar", "--files"):
        load(root)


def test_labels_in_json_and_txt(root, data_error):
    for part in range(3):
        write(root / f"shard-{part}.tar", members(part, lambda c: json.dumps({"id": 7, "Label": f"k{c}"}), "json"))
    assert load(root).class_names == ("k0", "k1", "k2")
    assert load(root, label_column="Label").class_names == ("k0", "k1", "k2")
    with data_error("shard-0.tar: sample 0/0: .json: no column is called 'kind'", "there is id, Label"):
        load(root, label_column="kind")
    for part in range(3):
        write(root / f"shard-{part}.tar", members(part, lambda c: f"kind {c}\n", "txt"))
    assert load(root).class_names == ("kind 0", "kind 1", "kind 2")


@pytest.mark.parametrize(
    ("extension", "content", "texts"),
    [
        ("json", b"[1]", ("must be an object with the label, got list",)),
        ("json", b"{", (".json is damaged",)),
        ("json", b'{"label": [1]}', ("the label 'label' in its .json must be a text or a number, got [1]",)),
        ("cls", b" \n", ("has no label, its .cls is empty",)),
        ("txt", b"x" * (2**24 + 1), ("its .txt has 16,777,217 bytes, more than any label",)),
        ("xml", b"x", ("has no label (cls, json, txt), its members end in jpg, xml", "--label-column")),
    ],
)
def test_samples_without_a_label(root, data_error, extension, content, texts):
    write(root / "more.tar", [("a/b.jpg", encoded(0, 0)), (f"a/b.{extension}", content)])
    with data_error(root / "more.tar", "sample a/b: ", *texts):
        load(root)


def test_which_image(root, data_error):
    more = [("x.jpg", encoded(0, 0)), ("x.mask.png", encoded(1, 1)), ("x.cls", b"0")]
    write(root / "more.tar", more)
    with data_error("more.tar: sample x: holds 2 images, its members end in jpg, mask.png, cls", "--image-column"):
        load(root)
    with data_error("shard-0.tar: sample 0/0: holds 0 images", "png, cls"):
        load(root, image_column="jpg")
    write(
        root / "more.tar", [*more, ("y.jpg", encoded(1, 0)), ("y.cls", b"1"), ("z.jpg", encoded(1, 0)), ("z.cls", b"1")]
    )
    assert load(root, files="more.tar", image_column=".jpg").class_counts.tolist() == [1, 1]


def test_what_other_programs_leave_is_passed_over(root):
    before = load(root)
    write(root / "shard-0.tar", [("._a.jpg", b"x"), (".DS_Store", b"x"), ("Thumbs.db", b"x"), *members(0)])
    (root / "._shard.tar").write_bytes(b"macOS")
    data = load(root)
    assert (data.fingerprint, data.validation) == (before.fingerprint, before.validation)


def test_archives_that_are_refused(root, data_error):
    write(root / "again.tar", [*members(0), ("0/0.png", b"")])
    with data_error(root / "again.tar", "holds the sample 0/0 twice"):
        load(root)
    write(root / "again.tar", [("a.cls", b"0"), ("a.cls", b"1")])
    with data_error(root / "again.tar", "holds a.cls twice"):
        load(root)
    (root / "again.tar").write_bytes(b"no archive at all, but long enough to hold a header" * 20)
    with data_error(root / "again.tar", "truncated or damaged"):
        load(root)
    content = (root / "shard-0.tar").read_bytes()
    (root / "again.tar").write_bytes(content[:600])
    with data_error(root / "again.tar", "truncated or damaged (unexpected end of data)"):
        load(root)
    (root / "again.tar").unlink()
    (root / "x.tar.GZ").write_bytes(b"x")
    assert len(load(root).train) == 9
    with data_error(root / "x.tar.GZ", "is compressed", "unpack it"):
        load(root, files="x.tar.*")
    for path in root.glob("*.tar"):
        path.unlink()
    with data_error(root / "x.tar.GZ", "is compressed", "unpack it"):
        load(root)


def test_no_archives(tmp_path, data_error):
    with data_error(f"{tmp_path}: holds no archive (.tar)", "--files"):
        load(tmp_path)


def test_an_archive_that_has_shrunk_since(root, data_error):
    data = load(root, strict=True)
    for path in root.glob("*.tar"):
        path.write_bytes(b"")
    with data_error("the archive is shorter than it was"):
        data.train[0]
    (root / "shard-0.tar").unlink()
    with data_error("shard-0.tar/", "cannot be read (No such file"):
        data.train[0]


def test_workers_read_the_same(root):
    train = load(root, augmentation="rrc", seed=1).train
    assert_workers_read_the_same(train)


def test_what_the_library_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as sink:
        for number, label in enumerate((3, 7, 3, 7)):
            sink.write({"__key__": f"sample{number:03d}", "cls": label, "png": encoded(label, number)})
    data = load(tmp_path)
    assert (data.class_names, data.class_counts.tolist(), len(data.test)) == (("3", "7"), [1, 1], 2)
    assert data.notes[0].startswith("labels are 2 of the numbers 3 to 7: classes are numbered 0 to 1")
