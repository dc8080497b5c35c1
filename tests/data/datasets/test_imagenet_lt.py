import shutil

import numpy as np
import pytest
from PIL import Image

from shike_fast.data import datasets, load_dataset
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD

FLAT, FOLDERS = "val/{file}", "val/{folder}/{file}"
KAGGLE = "ILSVRC/Data/CLS-LOC"
SYNSETS = ("n01440764", "n01443537", "n01484850")


def make(root, *, listed=FOLDERS, on_disk=FOLDERS, base="", prefix=""):
    """Three classes of 4, 2, 1 training images and 2 test images each."""
    train, test = [], []
    rng = np.random.default_rng(0)

    def save(path):
        (root / base / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / base / path, "JPEG")

    for label, (folder, count) in enumerate(zip(SYNSETS, (4, 2, 1), strict=True)):
        for i in range(count):
            train.append(f"{prefix}train/{folder}/{folder}_{i}.JPEG {label}\n")
            save(f"train/{folder}/{folder}_{i}.JPEG")
        for i in range(2):
            file = f"ILSVRC2012_val_{2 * label + i:08d}.JPEG"
            test.append(f"{prefix}{listed.format(folder=folder, file=file)} {label}\n")
            save(on_disk.format(folder=folder, file=file))
    (root / "ImageNet_LT_train.txt").write_text("".join(train))
    (root / "ImageNet_LT_test.txt").write_text("".join(test))
    (root / "synthetic.json").write_text('{"like": "imagenet-lt", "classes": 3, "images": {"train": 7, "test": 6}}')
    return root


def load(root, **options):
    return load_dataset("imagenet-lt", data_dir=root, **{"image_size": 32, **options})


@pytest.mark.parametrize("base", ["", KAGGLE])
@pytest.mark.parametrize("on_disk", [FLAT, FOLDERS])
@pytest.mark.parametrize("listed", [FLAT, FOLDERS])
def test_all_ways_to_list_and_to_keep_the_files(tmp_path, listed, on_disk, base):
    root = make(tmp_path, listed=listed, on_disk=on_disk, base=base)
    data = load(root, strict=True)
    assert data.class_counts.tolist() == [4, 2, 1]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = root / base / on_disk.format(folder=SYNSETS[1], file="ILSVRC2012_val_00000003.JPEG")
    assert data.test.store.name(3) == str(expected)
    assert data.test.batch(np.arange(6), seed=0, epoch=0)[0].shape == (6, 3, 32, 32)
    assert data.train.batch(np.arange(7), seed=0, epoch=0)[1].tolist() == [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("on_disk", [FLAT, FOLDERS])
def test_lists_that_hold_the_folders_of_kaggle(tmp_path, on_disk):
    root = make(tmp_path, on_disk=on_disk, prefix=f"{KAGGLE}/")
    assert len(load(root, strict=True).test[5][0]) == 3
    assert load(root).train.store.name(6) == str(root / "train" / SYNSETS[2] / f"{SYNSETS[2]}_0.JPEG")
    shutil.rmtree(root)
    root.mkdir()
    root = make(root, on_disk=on_disk, prefix=f"{KAGGLE}/", base=KAGGLE)
    assert load(root, strict=True).test[0][1] == 0


def test_flat_test_images_of_a_class_without_a_training_folder(tmp_path, data_error):
    root = make(tmp_path, listed=FLAT, on_disk=FOLDERS)
    path = root / "ImageNet_LT_train.txt"
    for i in range(7):
        shutil.copy(root / "train" / SYNSETS[2] / f"{SYNSETS[2]}_0.JPEG", root / f"{i}.JPEG")
    path.write_text("".join(f"{i}.JPEG {label}\n" for i, label in enumerate([0, 0, 0, 0, 1, 1, 2])))
    with data_error("ImageNet_LT_test.txt", "val/ILSVRC2012_val_00000000.JPEG"):
        load(root)


def test_what_is_said_of_it(tmp_path):
    info = datasets()["imagenet-lt"]
    assert info.augmentations[0] == "rrc-jitter-randaugment"
    assert set(info.augmentations) == {"none", "rrc", "rrc-jitter", "rrc-randaugment", "rrc-jitter-randaugment"}
    assert (info.resizable, info.default_imbalance_factor, info.downloadable) == (True, None, False)
    data = load(make(tmp_path))
    assert (data.mean, data.std, data.imbalance_factor) == (IMAGENET_MEAN, IMAGENET_STD, None)
    assert data.augmentation == "rrc-jitter-randaugment"


def test_class_names(tmp_path, data_error):
    root = make(tmp_path)
    assert load(root).class_names == SYNSETS
    (root / "LOC_synset_mapping.txt").write_text("n01443537 goldfish, Carassius auratus\nn01440764 tench\n")
    assert load(root).class_names == ("tench", "goldfish, Carassius auratus", "n01484850")
    (root / "LOC_synset_mapping.txt").write_text("n01440764\n")
    with data_error(root / "LOC_synset_mapping.txt", "expected lines 'n01440764 name'", "got 'n01440764'"):
        load(root)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_list(tmp_path, part, data_error):
    root = make(tmp_path)
    (root / f"ImageNet_LT_{part}.txt").unlink()
    with data_error(f"imagenet-lt: no {root / f'ImageNet_LT_{part}.txt'}; --data-dir DIR with train/ and val/"):
        load(root)


def test_it_needs_a_folder(data_error):
    with data_error("imagenet-lt: needs --data-dir", "image-net.org"):
        load_dataset("imagenet-lt")


def test_a_long_tail_subset(tmp_path):
    data = load(make(tmp_path), imbalance_factor=4)
    assert data.class_counts.tolist() == [4, 2, 1]
    assert data.train.store.name(4).endswith("n01443537_0.JPEG")
