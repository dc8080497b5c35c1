import numpy as np
import pytest
from PIL import Image

from shike_fast.data import datasets, load_dataset
from shike_fast.data.datasets.places_lt import parse
from shike_fast.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD

CATEGORIES = ("airfield", "apartment_building/outdoor", "zen_garden")
TRAIN = (
    "train/{category}/{file}",
    "train/{joined}/{file}",
    "data_256/{letter}/{category}/{file}",
    "data_large/{letter}/{category}/{file}",
    "places365_standard/train/{category}/{file}",
    "places365_standard/train/{joined}/{file}",
)
TEST = (
    "val_256/{file}",
    "val_large/{file}",
    "val/{file}",
    "val/{category}/{file}",
    "val/{joined}/{file}",
    "val_256/{category}/{file}",
    "places365_standard/val/{category}/{file}",
    "places365_standard/val/{joined}/{file}",
    "places365_standard/val/{file}",
)


def place(form, category, file):
    return form.format(category=category, joined=category.replace("/", "-"), letter=category[0], file=file)


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.fixture
def make(tmp_path, jpeg):
    """Write three classes of 4, 2, 1 training images and 2 test images each, listed and kept in the given forms."""

    def write(train=(TRAIN[0], TRAIN[0]), test=(TEST[0], TEST[0])):
        lists = {"train": [], "test": []}
        number = 0
        for label, (category, count) in enumerate(zip(CATEGORIES, (4, 2, 1), strict=True)):
            for part, (listed, kept), images in (("train", train, count), ("test", test, 2)):
                for _ in range(images):
                    number += 1
                    file = f"{number:08d}.jpg" if part == "train" else f"Places365_val_{number:08d}.jpg"
                    lists[part].append(f"{place(listed, category, file)} {label}\n")
                    path = tmp_path / place(kept, category, file)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(jpeg)
        for part, lines in lists.items():
            (tmp_path / f"Places_LT_{part}.txt").write_text("".join(lines))
        (tmp_path / "synthetic.json").write_text(
            '{"like": "places-lt", "classes": 3, "images": {"train": 7, "test": 6}}'
        )
        return tmp_path

    return write


def load(root, **options):
    return load_dataset("places-lt", data_dir=root, **{"image_size": 32, **options})


@pytest.mark.parametrize("kept", TRAIN)
@pytest.mark.parametrize("listed", TRAIN)
def test_all_ways_to_list_and_to_keep_the_training_images(make, listed, kept):
    root = make(train=(listed, kept))
    data = load(root, strict=True)
    assert data.class_names == CATEGORIES
    assert data.class_counts.tolist() == [4, 2, 1]
    assert data.train.store.name(5) == str(root / place(kept, CATEGORIES[1], "00000008.jpg"))
    assert data.train[5][1] == 1


@pytest.mark.parametrize("kept", TEST)
@pytest.mark.parametrize("listed", TEST)
def test_all_ways_to_list_and_to_keep_the_test_images(make, listed, kept):
    root = make(test=(listed, kept))
    data = load(root, strict=True)
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.store.name(3) == str(root / place(kept, CATEGORIES[1], "Places365_val_00000010.jpg"))
    assert data.test[3][1] == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"train/airfield/1.jpg", (b"train", b"airfield", b"1.jpg")),
        (b"data_256/a/airfield/1.jpg", (b"train", b"airfield", b"1.jpg")),
        (b"data_256/a/apartment_building/outdoor/1.jpg", (b"train", b"apartment_building/outdoor", b"1.jpg")),
        (b"places365_standard/val/apartment_building-outdoor/1.jpg", (b"val", b"apartment_building/outdoor", b"1.jpg")),
        (b"val_256/1.jpg", (b"val", None, b"1.jpg")),
        (b"1.jpg", (None, None, b"1.jpg")),
        (b"pictures/airfield/1.jpg", (None, None, b"1.jpg")),
    ],
)
def test_what_a_path_says(path, expected):
    assert parse(path) == expected


def test_test_images_among_those_of_training(make):
    # Such are the images of the list of validation: all forms of the training images serve for any list.
    root = make(train=(TRAIN[2], TRAIN[0]), test=(TRAIN[2], TRAIN[0]))
    assert load(root, strict=True).test[4][1] == 2


def test_paths_of_another_form_are_taken_as_they_are(make, data_error):
    root = make(train=("pictures/{letter}/{file}", "pictures/{letter}/{file}"))
    assert load(root, strict=True).train[6][1] == 2
    # Nothing tells the categories then, but the file of categories.
    assert load(root).class_names == ("class 000", "class 001", "class 002")
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/apartment_building/outdoor 1\n")
    assert load(root).class_names == ("airfield", "apartment_building/outdoor", "class 002")
    (root / "categories_places365.txt").write_text("/a/airfield\n")
    with data_error(root / "categories_places365.txt", "expected lines '/a/airfield 0'"):
        load(root)


def test_test_images_that_need_an_unknown_category(make, data_error):
    root = make(train=("pictures/{letter}/{file}", "pictures/{letter}/{file}"), test=(TEST[0], TEST[3]))
    with data_error("Places_LT_test.txt", "val_256/Places365_val_00000005.jpg", "val_large/", "Places365-Standard"):
        load(root)


def test_what_is_said_of_it(make):
    info = datasets()["places-lt"]
    assert info.augmentations[0] == "rrc-jitter"
    assert set(info.augmentations) == {"none", "rrc", "rrc-jitter", "rrc-randaugment", "rrc-jitter-randaugment"}
    assert (info.resizable, info.default_imbalance_factor) == (True, None)
    data = load(make())
    assert (data.mean, data.std, data.imbalance_factor) == (IMAGENET_MEAN, IMAGENET_STD, None)
    assert data.augmentation == "rrc-jitter"


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_list(make, part, data_error):
    root = make()
    (root / f"Places_LT_{part}.txt").unlink()
    with data_error(f"places-lt: no {root / f'Places_LT_{part}.txt'}; --data-dir DIR with the images"):
        load(root)


def test_a_folder_of_two_classes(make, data_error):
    root = make()
    path = root / "Places_LT_train.txt"
    path.write_text(path.read_text().replace("zen_garden", "airfield"))
    with data_error(path, "the folder 'airfield' holds images of label 0 and of label 2"):
        load(root)


def test_it_needs_a_folder(data_error):
    with data_error("places-lt: needs --data-dir", "Places365-Standard"):
        load_dataset("places-lt")
