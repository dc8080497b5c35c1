"""A data set of list files defined outside of the package: one module, and this test of it."""

import importlib
import inspect
import json
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from shike_fast import data
from shike_fast.data import registry
from shike_fast.data.recipes import PHOTOGRAPHS
from shike_fast.evaluate import main as evaluate
from shike_fast.train import main as train

MODULE = """
from shike_fast import data

@data.register_dataset(
    data.DatasetInfo(
        name="fish",
        description="three species of fish",
        how_obtained="--data-dir DIR with photos/, train.txt and test.txt",
        default_imbalance_factor=None,
        augmentations=data.photo_augmentations("rrc"),
        resizable=True,
        counts=data.Counts(classes=3, images={"train": 12, "test": 6}),
    )
)
def load(info, options):
    lists = {"train": "train.txt", "test": "test.txt"}
    return data.load_listed_images(info, options, **lists, folder="photos", class_names=("carp", "eel", "pike"))
"""


@pytest.fixture
def own(monkeypatch):
    """What is registered meanwhile is forgotten afterwards."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def fish(own, tmp_path, monkeypatch):
    """The module, imported as a user's own is."""
    (tmp_path / "fish_dataset.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("fish_dataset")
    yield module
    del sys.modules["fish_dataset"]


@pytest.fixture
def root(tmp_path):
    return listed(tmp_path / "fish", "photos")


def listed(root, folder):
    """12 training images (7, 4, 1 of a class) and 6 test images that the two lists name."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", (7, 4, 1)), ("test", (2, 2, 2))):
        lines = []
        for label, count in enumerate(counts):
            for i in range(count):
                pixels = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
                pixels[..., label] += 150
                name = f"{part}/{label}/{i}.png"
                (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / folder / name)
                lines.append(f"{name} {label}\n")
        (root / f"{part}.txt").write_text("".join(lines))
    return root


@pytest.mark.usefixtures("fish")
def test_it_is_loaded_and_its_counts_are_checked(root, data_error):
    fish = data.load_dataset("fish", data_dir=root, image_size=32)
    assert fish.class_counts.tolist() == [7, 4, 1]
    assert (len(fish.train), len(fish.test), fish.class_names) == (12, 6, ("carp", "eel", "pike"))
    image, label = fish.train[11]
    assert (image.shape, label) == ((3, 32, 32), 2)
    assert fish.augmentation == "rrc"
    path = root / "train.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with data_error(path, "expected 12 images (published), got 11", "--no-verify"):
        data.load_dataset("fish", data_dir=root)
    assert len(data.load_dataset("fish", data_dir=root, verify=False).train) == 11


@pytest.mark.usefixtures("fish")
def test_what_is_missing_is_named(root, data_error):
    (root / "photos").rename(root / "elsewhere")
    with data_error("fish: the images of train.txt are not in", "no train/0/0.png", "with photos/, train.txt"):
        data.load_dataset("fish", data_dir=root)
    (root / "test.txt").unlink()
    with data_error(f"fish: no {root / 'test.txt'}"):
        data.load_dataset("fish", data_dir=root)


@pytest.mark.usefixtures("fish")
def test_it_trains_with_the_default_recipe_and_what_overrides_it(root, tmp_path, capsys):
    assert data.datasets()["fish"].recipe == PHOTOGRAPHS
    small = "--model resnet8 --epochs 1 --batch-size 6 --image-size 16 --workers 0 --experts 2 --device cpu".split()
    run = tmp_path / "run"
    assert train(["--dataset", "fish", "--data-dir", str(root), "--output-dir", str(run), *small]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["model"], config["batch_size"]) == ("resnet8", 6)
    assert {name: config[name] for name in ("lr", "stage2_lr", "weight_decay")} == {
        name: PHOTOGRAPHS[name] for name in ("lr", "stage2_lr", "weight_decay")
    }
    (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert np.isfinite(row["train_loss"]) and row["unreadable_images"] == 0
    assert evaluate(["--checkpoint", str(run / "last.pt"), "--device", "cpu"]) == 0
    assert "carp" in (run / "last.per_class.csv").read_text()


@pytest.mark.usefixtures("own")
def test_too_few_class_names(root, data_error):
    info = data.DatasetInfo("two names", "", "", None, ("none",), resizable=True)

    @data.register_dataset(info)
    def load(info, options):
        return data.load_listed_images(info, options, train="train.txt", test="test.txt", class_names=("a", "b"))

    with data_error("two names: 2 class names for 3 classes"):
        data.load_dataset("two names", data_dir=root)


@pytest.mark.usefixtures("own")
def test_the_example_of_the_documentation_is_true(tmp_path):
    """Without the real images: any number of them is accepted."""
    example = inspect.getdoc(data.register_dataset).partition("::\n\n")[2].partition("\n\nA loading function")[0]
    exec(textwrap.dedent(example), {})
    info = data.datasets()["birds"]
    assert (info.recipe["epochs"], info.recipe["batch_size"]) == (100, PHOTOGRAPHS["batch_size"])
    birds = data.load_dataset("birds", data_dir=listed(tmp_path, "images"), verify=False)
    assert birds.class_names == ("class 0000", "class 0001", "class 0002")
    assert birds.train[0][0].shape == (3, 224, 224)
