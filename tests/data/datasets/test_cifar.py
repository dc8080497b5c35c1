import dataclasses
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from shike_fast.data import load_dataset
from shike_fast.data.datasets import cifar
from shike_fast.data.datasets.archives import check_md5, md5_of

CLASSES = {"cifar10-lt": 10, "cifar100-lt": 100}
TRAIN, TEST = 1000, 200


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


@pytest.fixture
def maker(name, cifar_maker):
    return cifar_maker(CLASSES[name])


@pytest.fixture
def small(monkeypatch):
    """Real CIFAR is 50,000 + 10,000 images; here the check expects the size of the generated files."""
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", TRAIN)
    monkeypatch.setattr(cifar, "TEST_IMAGES", TEST)


@pytest.fixture
def accept(monkeypatch):
    """``accept(archive)``: make its checksum the published one of its form."""

    def replace(path):
        for name in ("CIFAR10", "CIFAR100"):
            description = getattr(cifar, name)
            forms = tuple(
                dataclasses.replace(form, md5=md5_of(path)) if form.archive == path.name else form
                for form in description.forms
            )
            monkeypatch.setattr(cifar, name, dataclasses.replace(description, forms=forms))

    return replace


def check_content(data, classes):
    """The images of CifarMaker after the long-tail subset at imbalance factor 10."""
    largest = TRAIN // classes
    counts = [int(largest * 0.1 ** (c / (classes - 1))) for c in range(classes)]
    assert data.class_counts.tolist() == counts
    index = np.array([classes * j + c for c in range(classes) for j in range(counts[c])])
    np.testing.assert_array_equal(data.train.labels, index % classes)
    expected = np.broadcast_to((index % 251)[:, None, None, None], (len(index), 3, 32, 32))
    np.testing.assert_array_equal(data.train.images, expected)
    np.testing.assert_array_equal(data.test.labels, np.arange(TEST) % classes)
    assert (data.in_channels, data.image_size, data.num_classes) == (3, 32, classes)


def test_class_names():
    assert len(cifar.CIFAR10_CLASSES) == 10
    assert len(set(cifar.CIFAR100_CLASSES)) == 100
    assert list(cifar.CIFAR100_CLASSES) == sorted(cifar.CIFAR100_CLASSES)


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_gives_the_same_data(name, maker, form, packed, tmp_path, small, accept):
    contents = getattr(maker, form)(TRAIN, TEST)
    if packed:
        accept(maker.archive(tmp_path, form, contents))
    else:
        maker.extract(tmp_path, form, contents)
    before = sorted(tmp_path.rglob("*"))
    check_content(load_dataset(name, data_dir=tmp_path, imbalance_factor=10), CLASSES[name])
    assert sorted(tmp_path.rglob("*")) == before  # archives are read where they lie


@pytest.mark.parametrize("form", ["binary", "python"])
def test_data_dir_may_be_the_extracted_folder_itself(name, maker, form, tmp_path, small):
    folder = maker.extract(tmp_path, form, getattr(maker, form)(TRAIN, TEST))
    check_content(load_dataset(name, data_dir=folder, imbalance_factor=10), CLASSES[name])


@pytest.mark.parametrize(("protocol", "text_keys"), [(4, False), (5, True)])
def test_batches_that_a_newer_python_wrote(name, maker, protocol, text_keys, tmp_path, small):
    maker.extract(tmp_path, "python", maker.python(TRAIN, TEST, protocol, text_keys))
    check_content(load_dataset(name, data_dir=tmp_path, imbalance_factor=10), CLASSES[name])


def test_pixels_are_channel_after_channel(tmp_path, small, cifar_maker):
    maker = cifar_maker(10)
    contents = maker.binary(TRAIN, TEST)
    record = np.concatenate([[0], np.arange(3072) // 16]).astype(np.uint8).tobytes()
    contents["data_batch_1.bin"] = record + contents["data_batch_1.bin"][3073:]
    maker.extract(tmp_path, "binary", contents)
    image = load_dataset("cifar10-lt", data_dir=tmp_path, imbalance_factor=1).train.images[0]
    np.testing.assert_array_equal(image.ravel(), np.arange(3072) // 16)
    assert (image[1, 0, 0], image[0, 1, 0]) == (64, 2)


@pytest.mark.parametrize(
    ("name", "total", "largest", "smallest"), [("cifar10-lt", 12_406, 5000, 50), ("cifar100-lt", 10_847, 500, 5)]
)
def test_the_full_size_passes_the_check_and_gives_the_published_counts(
    name, total, largest, smallest, tmp_path, cifar_maker
):
    maker = cifar_maker(CLASSES[name])
    maker.extract(tmp_path, "binary", maker.binary(50_000, 10_000))
    data = load_dataset(name, data_dir=tmp_path)
    assert data.class_counts.sum() == len(data.train) == total
    assert (data.class_counts[0], data.class_counts[-1], len(data.test)) == (largest, smallest, 10_000)
    assert data.augmentation == "cifar"


@pytest.mark.parametrize("form", ["binary", "python"])
def test_the_exact_number_of_records_is_checked(name, maker, form, tmp_path, data_error):
    folder = maker.extract(tmp_path, form, getattr(maker, form)(TRAIN, TEST))
    with data_error(folder, "expected", "0000"):
        load_dataset(name, data_dir=tmp_path)
    data = load_dataset(name, data_dir=tmp_path, imbalance_factor=10, verify=False)
    check_content(data, CLASSES[name])


def test_a_truncated_record(name, maker, tmp_path, data_error):
    folder = maker.extract(tmp_path, "binary", maker.binary(TRAIN, TEST))
    path = folder / ("test_batch.bin" if CLASSES[name] == 10 else "test.bin")
    path.write_bytes(path.read_bytes()[:-7])
    with data_error(path, "bytes, expected a multiple of", "obtain the file again"):
        load_dataset(name, data_dir=tmp_path, verify=False)


@pytest.mark.parametrize("form", ["binary", "python"])
def test_a_missing_file_of_an_extracted_archive(name, maker, form, tmp_path, small, data_error):
    folder = maker.extract(tmp_path, form, getattr(maker, form)(TRAIN, TEST))
    missing = sorted(folder.iterdir())[0]
    missing.unlink()
    with data_error(missing, "missing", f"extract {maker.stem}-{form}.tar.gz again"):
        load_dataset(name, data_dir=tmp_path)


def test_nothing_there(name, maker, tmp_path, data_error):
    with data_error(tmp_path, f"{maker.stem}-binary.tar.gz", f"{maker.stem}-python.tar.gz", "--download"):
        load_dataset(name, data_dir=tmp_path)


def test_label_out_of_range_in_the_binary_form(tmp_path, small, cifar_maker, data_error):
    maker = cifar_maker(10)
    contents = maker.binary(TRAIN, TEST)
    content = bytearray(contents["data_batch_3.bin"])
    content[3073 * 4] = 10
    folder = maker.extract(tmp_path, "binary", contents | {"data_batch_3.bin": bytes(content)})
    with data_error(folder / "data_batch_3.bin", "label 10 of record 4 is outside 0 … 9"):
        load_dataset("cifar10-lt", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({b"fine_labels": [*range(99), -1] * 10}, "label -1 of record 99 is outside 0 … 99"),
        ({b"fine_labels": [*range(99), 100] * 10}, "label 100 of record 99"),
        ({b"fine_labels": list(range(100)) * 9}, "1000 images and 900 labels, expected 1000"),
        ({b"fine_labels": ["cat"] * 1000}, "'fine_labels' is not a list of integers"),
        ({b"fine_labels": [2**80] * 1000}, "'fine_labels' is not a list of integers"),
        ({b"fine_labels": None}, "'fine_labels' is not a list of integers"),
        ({b"data": None}, "'data' is not an array of bytes"),
        ({b"data": np.zeros((1000, 3072), np.float32)}, "'data' is not an array of bytes"),
        ({b"data": np.zeros((1000, 3071), np.uint8)}, "'data' is not an array of bytes"),
    ],
)
def test_python_batches_with_unusable_entries(change, text, tmp_path, small, cifar_maker, data_error):
    maker = cifar_maker(100)
    contents = maker.python(TRAIN, TEST)
    batch = pickle.loads(contents["train"]) | change
    folder = maker.extract(tmp_path, "python", contents | {"train": pickle.dumps(batch, protocol=2)})
    with data_error(folder / "train", text):
        load_dataset("cifar100-lt", data_dir=tmp_path)


class Command:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("packed", [False, True])
def test_a_pickle_with_code_is_refused_not_run(packed, tmp_path, monkeypatch, small, accept, cifar_maker, data_error):
    monkeypatch.chdir(tmp_path)
    maker = cifar_maker(10)
    contents = maker.python(TRAIN, TEST) | {"data_batch_2": pickle.dumps({b"data": Command()})}
    if packed:
        accept(maker.archive(tmp_path, "python", contents))
    else:
        maker.extract(tmp_path, "python", contents)
    with data_error("data_batch_2", "mkdir", "do not trust this file"):
        load_dataset("cifar10-lt", data_dir=tmp_path)
    assert not (tmp_path / "executed").exists()


def test_wrong_checksum_of_an_archive(name, maker, tmp_path, small, data_error):
    path = maker.archive(tmp_path, "binary", maker.binary(TRAIN, TEST))
    with data_error(path, "wrong checksum", md5_of(path), "delete it"):
        load_dataset(name, data_dir=tmp_path)
    assert path.is_file()
    # Without the check the archive serves.
    check_content(load_dataset(name, data_dir=tmp_path, imbalance_factor=10, verify=False), CLASSES[name])


def test_an_existing_archive_is_never_downloaded_again(name, maker, tmp_path, monkeypatch, data_error):
    monkeypatch.setattr(cifar, "download", lambda *_: pytest.fail("downloaded"))
    path = maker.archive(tmp_path, "binary", maker.binary(TRAIN, TEST))
    with data_error(path, "wrong checksum"):
        load_dataset(name, data_dir=tmp_path, download=True)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_archive(name, maker, keep, tmp_path, data_error):
    path = maker.archive(tmp_path, "binary", maker.binary(TRAIN, TEST))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with data_error(path, "truncated or damaged", "obtain the file again"):
        load_dataset(name, data_dir=tmp_path, verify=False)


def test_damaged_archive(name, maker, tmp_path, data_error):
    path = maker.archive(tmp_path, "binary", maker.binary(TRAIN, TEST))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    with data_error(path, "truncated or damaged"):
        load_dataset(name, data_dir=tmp_path, verify=False)


def test_archive_without_a_wanted_member(tmp_path, small, accept, cifar_maker, data_error):
    maker = cifar_maker(10)
    contents = maker.binary(TRAIN, TEST)
    del contents["data_batch_4.bin"]
    path = maker.archive(tmp_path, "binary", contents)
    accept(path)
    with data_error(path, "holds no data_batch_4.bin"):
        load_dataset("cifar10-lt", data_dir=tmp_path)


def test_archive_member_that_is_a_link(tmp_path, accept, data_error):
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        member.type = tarfile.SYMTYPE
        member.linkname = "/etc/passwd"
        archive.addfile(member)
    accept(path)
    with data_error(path, "member cifar-100-binary/train.bin is not a regular file"):
        load_dataset("cifar100-lt", data_dir=tmp_path)


def test_archive_member_of_absurd_size(tmp_path, accept, monkeypatch, data_error):
    monkeypatch.setattr(cifar, "_LARGEST_FILE", 100)
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        member.size = 101
        archive.addfile(member, io.BytesIO(bytes(101)))
    accept(path)
    with data_error(path, "has 101 bytes, expected at most 100"):
        load_dataset("cifar100-lt", data_dir=tmp_path)


def test_archive_members_that_point_outside_write_nothing(tmp_path, small, accept, cifar_maker):
    """Contents are read in memory: a path that leaves the folder has nowhere to be written to."""
    maker = cifar_maker(100)
    data_dir = tmp_path / "inner"
    data_dir.mkdir()
    path = data_dir / "cifar-100-binary.tar.gz"
    contents = maker.binary(TRAIN, TEST)
    with tarfile.open(path, "w:gz") as archive:
        for member_name, content in {"../evil": b"x", "../../train.bin": contents["train.bin"]}.items():
            member = tarfile.TarInfo(member_name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("cifar-100-binary/test.bin")
        member.size = len(contents["test.bin"])
        archive.addfile(member, io.BytesIO(contents["test.bin"]))
    accept(path)
    check_content(load_dataset("cifar100-lt", data_dir=data_dir, imbalance_factor=10), 100)
    assert sorted(tmp_path.rglob("*")) == [data_dir, path]


def test_an_archive_that_cannot_be_read(tmp_path, data_error):
    with data_error(tmp_path / "absent", "cannot be read"):
        check_md5(tmp_path / "absent", "0" * 32)


def test_a_folder_in_place_of_an_archive_is_not_taken_for_one(name, maker, tmp_path, data_error):
    (tmp_path / f"{maker.stem}-binary.tar.gz").mkdir()
    with data_error(f"no files in {tmp_path}"):
        load_dataset(name, data_dir=tmp_path)
