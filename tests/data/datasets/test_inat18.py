import json
import os

import numpy as np
import pytest
from PIL import Image

from shike_fast.data import datasets, load_dataset
from shike_fast.data.datasets.coco import read_categories, read_images

COUNTS = (4, 2, 1)
NAMES = ("Abies alba", "Bombus terrestris", "Corvus corax")
JSON, LISTS = ("train2018.json", "val2018.json"), ("iNaturalist18_train.txt", "iNaturalist18_val.txt")


class Maker:
    """Three classes of 4, 2, 1 training images and one test image each, in the form of iNaturalist 2018."""

    def __init__(self, root):
        self.root = root
        rng = np.random.default_rng(0)
        self.parts = {}
        number = 0
        for part, counts in (("train", COUNTS), ("val", (1, 1, 1))):
            records = []
            for label, count in enumerate(counts):
                for _ in range(count):
                    path = f"train_val2018/Plantae/{label}/{number:032x}.jpg"
                    (root / path).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / path)
                    records.append((path, label))
                    number += 1
            self.parts[part] = records
        self.describe(train=sum(COUNTS), test=3)

    def describe(self, classes=3, **images):
        text = json.dumps({"like": "inat18", "classes": classes, "images": images})
        (self.root / "synthetic.json").write_text(text)

    def coco(self, part):
        """What the JSON file of a part says. Ids join images and annotations, which are in no common order."""
        start = 100 if part == "train" else 500
        images = [
            {
                "id": start + 7 * i,
                "width": 48,
                "height": 40,
                "file_name": path,
                "license": 1,
                "rights_holder": "A \u00e9",
            }
            for i, (path, _) in enumerate(self.parts[part])
        ]
        annotations = [
            {"id": start + i, "image_id": start + 7 * i, "category_id": label}
            for i, (_, label) in enumerate(self.parts[part])
        ]
        categories = [{"id": i, "name": name, "supercategory": "Plantae"} for i, name in enumerate(NAMES)]
        return {
            "info": {"year": 2018},
            "images": images,
            "licenses": [{"id": 1, "name": "CC", "url": ""}],
            "annotations": annotations[::-1],
            "categories": categories[::-1],
        }

    def write_json(self, folder="", train=None, val=None):
        (self.root / folder).mkdir(exist_ok=True)
        for name, content in zip(JSON, (train or self.coco("train"), val or self.coco("val")), strict=True):
            (self.root / folder / name).write_text(json.dumps(content))

    def write_lists(self, cut=""):
        for name, records in zip(LISTS, self.parts.values(), strict=True):
            lines = "".join(f"{path.removeprefix(cut)} {label}\n" for path, label in records)
            (self.root / name).write_text(lines)


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path)


def load(root, **options):
    return load_dataset("inat18", data_dir=root, **{"image_size": 32, **options})


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_json_files(maker, folder):
    maker.write_json(folder)
    data = load(maker.root, strict=True)
    assert data.class_names == NAMES
    assert data.class_counts.tolist() == list(COUNTS)
    assert data.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.train.store.name(5) == str(maker.root / maker.parts["train"][5][0])
    assert data.train.batch(np.arange(7), seed=0, epoch=0)[0].shape == (7, 3, 32, 32)
    assert data.test[2][1] == 2


@pytest.mark.parametrize("cut", ["", "train_val2018/"])
def test_lists(maker, cut):
    maker.write_lists(cut)
    data = load(maker.root, strict=True)
    assert data.class_names == ("class 0000", "class 0001", "class 0002")
    assert data.class_counts.tolist() == list(COUNTS)
    assert data.test.store.name(1) == str(maker.root / maker.parts["val"][1][0])
    assert data.test[1][1] == 1


def test_json_files_and_lists_say_the_same(maker):
    maker.write_json()
    fingerprint = load(maker.root).fingerprint
    maker.write_lists()
    assert load(maker.root).fingerprint == fingerprint
    (maker.root / JSON[0]).unlink()
    assert load(maker.root).fingerprint == fingerprint


def test_names_that_are_not_utf_8_and_hold_spaces(maker):
    maker.write_lists()
    old = maker.root / maker.parts["train"][0][0]
    old.rename(old.with_name(os.fsdecode(b"a caf\xe9.jpg")))
    path = maker.root / LISTS[0]
    path.write_bytes(path.read_bytes().replace(old.name.encode(), b"a caf\xe9.jpg"))
    data = load(maker.root, strict=True)
    assert data.train.store.name(0).endswith(os.fsdecode(b"/a caf\xe9.jpg"))
    assert data.train[0][1] == 0


def test_what_is_said_of_it(maker):
    info = datasets()["inat18"]
    assert info.augmentations[0] == "rrc-randaugment"
    assert set(info.augmentations) == {"none", "rrc", "rrc-jitter", "rrc-randaugment", "rrc-jitter-randaugment"}
    assert (info.resizable, info.default_imbalance_factor) == (True, None)
    maker.write_json()
    data = load(maker.root)
    assert (data.mean, data.std) == ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
    assert (data.augmentation, data.imbalance_factor) == ("rrc-randaugment", None)


@pytest.mark.parametrize("write", [Maker.write_json, Maker.write_lists])
@pytest.mark.parametrize("folder", ["", "annotations"])
def test_readable_names(maker, write, folder, data_error):
    write(maker)
    (maker.root / "annotations").mkdir(exist_ok=True)
    path = maker.root / folder / "categories.json"
    categories = [{"id": i, "name": f"Name {i}", "kingdom": "Plantae"} for i in range(4)]
    path.write_text(json.dumps(categories))
    assert load(maker.root).class_names == ("Name 0", "Name 1", "Name 2")
    path.write_text(json.dumps({"categories": categories[:3]}))
    assert load(maker.root).class_names == ("Name 0", "Name 1", "Name 2")
    path.write_text(json.dumps(categories[:2]))
    with data_error(path, "expected 3 categories, got 2", "remove it"):
        load(maker.root)
    path.write_text("[1]")
    with data_error(path, "Expected `object`, got `int` - at `$[0]`"):
        load(maker.root)


def test_nothing_is_there(tmp_path, data_error):
    with data_error(
        f"neither {tmp_path / JSON[0]} nor {tmp_path / 'annotations' / JSON[0]} nor {tmp_path / LISTS[0]} is there",
        "iNaturalist 2018 competition",
    ):
        load(tmp_path)
    with data_error("inat18: needs --data-dir"):
        load_dataset("inat18")


@pytest.mark.parametrize(("write", "name"), [(Maker.write_json, JSON[1]), (Maker.write_lists, LISTS[1])])
def test_no_validation_images(maker, write, name, data_error):
    write(maker)
    (maker.root / name).unlink()
    with data_error(f"inat18: no {maker.root / name}; --data-dir DIR with"):
        load(maker.root)


def test_published_counts(maker, data_error):
    (maker.root / "synthetic.json").unlink()
    maker.write_lists()
    with data_error(maker.root / LISTS[0], "expected 437,513 images (published), got 7", "--no-verify"):
        load(maker.root)
    maker.write_json()
    with data_error(maker.root / JSON[0], "expected 8,142 categories (published), got 3", "--no-verify"):
        load(maker.root)
    data = load(maker.root, verify=False)
    assert (len(data.train), len(data.test), data.num_classes) == (7, 3, 3)


@pytest.mark.parametrize(
    ("images", "name", "text"),
    [
        ({"train": 8, "test": 3}, JSON[0], "expected 8 images (generated), got 7"),
        ({"train": 7, "test": 4}, JSON[1], "expected 4 images (generated), got 3"),
    ],
)
def test_wrong_counts(maker, images, name, text, data_error):
    maker.write_json()
    maker.describe(**images)
    with data_error(maker.root / name, text, "--no-verify"):
        load(maker.root)
    assert len(load(maker.root, verify=False).train) == 7


def test_a_category_without_images(maker, data_error):
    train = maker.coco("train")
    for annotation in train["annotations"]:
        annotation["category_id"] = min(annotation["category_id"], 1)
    maker.write_json(train=train)
    with data_error(maker.root / JSON[0], "expected images of 3 classes (generated), got none of class 2"):
        load(maker.root)
    assert load(maker.root, verify=False).class_counts.tolist() == [4, 3, 0]


def set_in(part, index, **values):
    def damage(content):
        content[part][index] |= values

    return damage


def delete(part, index=None, key=None):
    def damage(content):
        if index is None:
            del content[part]
        elif key is None:
            del content[part][index]
        else:
            del content[part][index][key]

    return damage


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (set_in("images", 1, id=100), "two images have the id 100"),
        (set_in("annotations", 0, image_id=999), "annotation 106 is of image 999, which is unknown"),
        (set_in("annotations", 0, image_id=-1), "annotation 106 is of image -1, which is unknown"),
        (set_in("annotations", 0, image_id=100), "image 100 has two annotations, expected one"),
        (delete("annotations", 2), "image 128 has no annotation, expected one"),
        (set_in("annotations", 0, category_id=3), "annotation 106 gives image 142 the category 3, expected 0 … 2"),
        (set_in("annotations", 0, category_id=-1), "annotation 106 gives image 142 the category -1, expected 0 … 2"),
        (delete("categories", 1), "expected the category ids 0 … 1, but 1 is missing"),
        (set_in("categories", 0, id=1), "expected the category ids 0 … 2, but 1 occurs twice"),
        (set_in("categories", 0, id=3), "expected the category ids 0 … 2, but 2 is missing"),
        (set_in("categories", 0, id=-4), "expected the category ids 0 … 2, but -4 is negative"),
        (delete("categories"), "has no 'categories'"),
        (lambda content: content["categories"].clear(), "'categories' is empty"),
        (lambda content: content["images"].clear(), "'images' is empty"),
        (delete("images"), "missing required field `images`"),
        (delete("annotations"), "missing required field `annotations`"),
        (delete("images", 3, "id"), "in 'images' (Object missing required field `id` - at `$[3]`)"),
        (delete("annotations", 3, "image_id"), "in 'annotations' (Object missing required field `image_id`"),
        (set_in("images", 2, id="7"), "in 'images' (Expected `int`, got `str` - at `$[2].id`)"),
        (set_in("images", 2, id=2**63), "in 'images' (Expected `int` <= 9223372036854775807 - at `$[2].id`)"),
        (set_in("images", 2, id=2**70), "in 'images'"),
        (set_in("annotations", 2, category_id=1.5), "in 'annotations' (Expected `int`, got `float`"),
        (set_in("images", 2, file_name=None), "in 'images' (Expected `str`, got `null` - at `$[2].file_name`)"),
        (set_in("images", 2, file_name="/etc/passwd"), "image 114: the file_name '/etc/passwd' is absolute"),
        (set_in("images", 2, file_name="a/../../b"), "image 114: the file_name 'a/../../b' holds '..'"),
        (set_in("images", 2, file_name="a\0b"), r"image 114: the file_name 'a\x00b' holds a NUL byte"),
        (set_in("images", 2, file_name=""), "image 114: the file_name '' is empty"),
        (lambda content: content.update(annotations={}), "in 'annotations' (Expected `array`, got `object`)"),
        (lambda content: content.update(categories=None), "in 'categories' (Expected `array`, got `null`)"),
    ],
)
def test_a_damaged_json_file(maker, damage, text, data_error):
    train = maker.coco("train")
    damage(train)
    maker.write_json(train=train)
    with data_error(f"{maker.root / JSON[0]}: ", text, "obtain the file again"):
        load(maker.root, verify=False)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "Input data was truncated"),
        (b'{"images": [', "Input data was truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"images": [}', "JSON is malformed"),
        (b'{"images": ["\xff"]}', ""),
        (b'{"images": [], "annotations": ' + b"[" * 100_000, ""),
    ],
)
def test_a_json_file_that_is_none(maker, content, text, data_error):
    maker.write_json()
    (maker.root / JSON[1]).write_bytes(content)
    with data_error(f"{maker.root / JSON[1]}: ", "COCO's form", text, "obtain the file again"):
        load(maker.root)


def test_a_json_file_that_cannot_be_read(tmp_path, data_error):
    with data_error(f"{tmp_path}: cannot be read (Is a directory)"):
        read_images(tmp_path)
    with data_error(f"{tmp_path / 'none.json'}: cannot be read (No such file or directory)"):
        read_categories(tmp_path / "none.json")


def test_validation_images_of_other_categories(maker, data_error):
    val = maker.coco("val")
    val["categories"][0]["name"] = "Another"
    maker.write_json(val=val)
    with data_error(maker.root / JSON[1], f"its categories are not those of {maker.root / JSON[0]}"):
        load(maker.root)
    del val["categories"]
    maker.write_json(val=val)
    assert load(maker.root).class_names == NAMES


def test_a_label_outside_the_range_of_a_list(maker, data_error):
    maker.write_lists()
    path = maker.root / LISTS[1]
    path.write_text(path.read_text().replace(" 2\n", " 3\n"))
    with data_error(f"{path}: line 3: label 3 is outside 0 … 2"):
        load(maker.root)


def test_no_image_is_there(maker, data_error):
    maker.write_json()
    (maker.root / "train_val2018").rename(maker.root / "images")
    name = maker.parts["train"][0][0]
    with data_error(f"no {name} (looked for {name}, train_val2018/{name})", "train2018.json", "competition"):
        load(maker.root)
