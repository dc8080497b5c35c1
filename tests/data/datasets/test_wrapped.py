import random

import numpy as np
import pytest
import torch
import torchvision_operators  # noqa: F401  (lets torchvision be imported)
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from shike_fast import data
from shike_fast.data import registry
from shike_fast.data.images.samples import SampleStore, TensorSource
from shike_fast.data.recipes import PHOTOGRAPHS, SMALL_IMAGES
from shike_fast.engine.config import resolve
from shike_fast.engine.setup import make_loader
from shike_fast.engine.trainer import Trainer
from shike_fast.errors import ConfigError

LABELS = [0] * 6 + [1] * 4 + [2] * 2


class Samples(Dataset):
    """Grey images, of any kind that ``make`` makes, whose brightness is their number."""

    def __init__(self, make, labels=LABELS, attribute="targets"):
        self.make = make
        self.given = labels
        if attribute is not None:
            setattr(self, attribute, labels)

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return self.make(index), self.given[index]


def pil(index):
    return Image.new("RGB", (40, 30), (20 * index,) * 3)


def pixels(index):
    return np.full((30, 40, 3), 20 * index, np.uint8)


IMAGES = {
    "pil": pil,
    "palette": lambda i: pil(i).convert("P"),
    "grey": lambda i: pil(i).convert("L"),
    "hwc": pixels,
    "hwc1": lambda i: pixels(i)[..., :1],
    "rgba": lambda i: np.concatenate([pixels(i), pixels(255 // 20)[..., :1]], axis=2),
    "hw": lambda i: pixels(i)[..., 0],
    "chw": lambda i: torch.from_numpy(pixels(i)).permute(2, 0, 1),
}


def finished(index):
    return torch.full((3, 16, 16), index / 10)


def randomly(index):
    return torch.full((3, 8, 8), float(index)) + torch.rand(()) + random.random() + float(np.random.rand())


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_treated_as_photographs(kind):
    own = data.from_dataset(Samples(IMAGES[kind]), Samples(IMAGES[kind]), image_size=16, augmentation="none")
    assert own.class_counts.tolist() == [6, 4, 2]
    assert own.class_names == ("0", "1", "2")
    assert isinstance(own.train.store, SampleStore)
    image, label = own.train[11]
    expected = (220 / 255 - torch.tensor(own.mean)) / torch.tensor(own.std)
    assert label == 2
    torch.testing.assert_close(image.mean((1, 2)), expected, atol=0.03, rtol=0)
    assert own.test[3][0].shape == (3, 16, 16)
    assert own.info.recipe == PHOTOGRAPHS and own.info.augmentations == data.photo_augmentations("rrc")


def test_a_camera_orientation_is_applied():
    def tagged(index):
        image = Image.new("RGB", (40, 20))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.info["exif"] = exif.tobytes()
        return image

    store = data.from_dataset(Samples(tagged), Samples(tagged)).train.store
    assert (store.open(0).width, store.open(0).height) == (20, 40)


def test_the_augmentation_and_the_tail(data_error):
    settings = {"image_size": 16, "augmentation": "rrc-jitter", "imbalance_factor": 3, "long_tail": "step", "seed": 2}
    own = data.from_dataset(Samples(pil), Samples(pil), **settings)
    assert (own.augmentation, own.class_counts.tolist(), own.imbalance_factor) == ("rrc-jitter", [6, 4, 2], 3.0)
    one, other = (own.train.batch(np.arange(3), seed=2, epoch=epoch)[0] for epoch in (0, 1))
    assert not torch.equal(one, other)
    with data_error("mine: unknown augmentation 'cifar'"):
        data.from_dataset(Samples(pil), name="mine", augmentation="cifar")
    with data_error("mine: has no option path, nor has another"):
        data.from_dataset(Samples(pil), name="mine", path="x")


@pytest.mark.parametrize("make", [pil, finished])
def test_without_a_test_set_some_samples_are_set_aside(make, data_error):
    own = data.from_dataset(Samples(make), val_share=0.5, split_seed=1)
    assert (own.class_counts.tolist(), np.bincount(own.test.labels).tolist()) == ([3, 2, 1], [3, 2, 1])
    assert (own.validation.whole, own.validation.seed) == (12, 1)
    if make is finished:
        numbers = [round(float(own.test[i][0].mean()) * 10) for i in range(6)]
        assert numbers == [int(name) for name in own.validation.names]
    again = data.from_dataset(Samples(make), val_share=0.5, split_seed=1, seed=9)
    assert (again.fingerprint, again.validation) == (own.fingerprint, own.validation)
    assert data.from_dataset(Samples(make), val_share=0.5, split_seed=2).fingerprint != own.fingerprint
    with data_error("share: "):
        data.from_dataset(Samples(make), Samples(make), val_share=0.5)


def test_finished_tensors_are_taken_as_they_are():
    own = data.from_dataset(Samples(finished), Samples(finished), imbalance_factor=6)
    assert isinstance(own.train, TensorSource)
    assert (own.in_channels, own.image_size, own.mean, own.std) == (3, 16, (0.0,) * 3, (1.0,) * 3)
    assert own.class_counts.tolist() == [6, 2, 1]
    assert torch.equal(own.train[7][0], finished(7)) and own.train[8][1] == 2
    assert torch.equal(own.train[8][0], finished(10))
    assert own.info.recipe == SMALL_IMAGES and own.info.augmentations == ("own",)
    named = data.from_dataset(Samples(finished), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert (named.mean, named.std) == ((0.5,) * 3, (0.25,) * 3)


def test_random_transforms_depend_on_seed_epoch_index_and_repeat_alone():
    train = data.from_dataset(Samples(randomly), Samples(randomly)).train
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    indices = np.array([3, 5, 3])
    images, labels = train.batch(indices, seed=1, epoch=2)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()
    assert torch.equal(images[0], images[2]) and labels.tolist() == [0, 0, 0]
    torch.manual_seed(99)
    assert torch.equal(train.batch(indices[1:], seed=1, epoch=2)[0], images[1:])
    repeats = np.array([0, 0, 1])
    again = train.batch(indices, seed=1, epoch=2, repeats=repeats)[0]
    assert torch.equal(again[:2], images[:2]) and not torch.equal(again[2], images[2])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(train.batch(indices, **other)[0], images)
    batches = []
    for workers in (0, 2):
        loader = data.Loader(train, batch_size=5, shuffle=True, num_workers=workers, views=[train, train])
        batches.append(torch.cat([images for images, _ in loader.epoch(1)]))
        loader.close()
    assert torch.equal(*batches)
    assert not torch.equal(batches[0][:5], batches[0][5:10])  # the two views of a random transform


@pytest.mark.parametrize(
    "labels", [LABELS, tuple(LABELS), np.array(LABELS), torch.tensor(LABELS), [torch.tensor(label) for label in LABELS]]
)
@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_labels_of_an_attribute(labels, attribute):
    assert data.from_dataset(Samples(pil, labels, attribute), image_size=8).class_counts.tolist() == [5, 3, 1]


def test_labels_through_the_data_sets_of_pytorch():
    whole = Samples(finished)
    whole.classes = ["ant", "bee", "wasp"]
    part = Subset(whole, [0, 1, 2, 6, 7, 10, 11])
    own = data.from_dataset(part)
    assert (own.class_names, own.class_counts.tolist()) == (("ant", "bee", "wasp"), [2, 1, 1])
    assert data.from_dataset(Subset(whole, [0, 1, 10, 11])).class_names == ("ant", "wasp")
    assert data.from_dataset(ConcatDataset([whole, part])).class_counts.tolist() == [8, 5, 3]
    tensors = TensorDataset(torch.zeros(12, 1, 8, 8), torch.tensor(LABELS))
    assert data.from_dataset(tensors).class_counts.tolist() == [5, 3, 1]


def test_files_of_an_image_folder(tmp_path):
    images = Samples(pil, attribute=None)
    images.root = str(tmp_path)
    images.samples = [(str(tmp_path / f"{i}.jpg"), label) for i, label in enumerate(LABELS)]
    own = data.from_dataset(images)
    assert set(own.validation.names) < {f"{i}.jpg".encode() for i in range(12)}
    inner = data.from_dataset(Subset(images, range(12)))
    assert (inner.validation, inner.fingerprint) == (own.validation, own.fingerprint)
    named = data.from_dataset(images, names=[f"x{i}" for i in range(12)])
    assert named.fingerprint != own.fingerprint


def test_image_folders_of_torchvision(image_dir):
    folders = pytest.importorskip("torchvision").datasets.ImageFolder
    own = data.from_dataset(
        folders(image_dir / "train"), folders(image_dir / "val"), image_size=16, augmentation="none"
    )
    files = data.load_dataset("imagefolder", data_dir=image_dir, image_size=16, augmentation="none")
    assert (own.class_names, own.class_counts.tolist()) == (files.class_names, files.class_counts.tolist())
    assert torch.equal(own.test[3][0], files.test[3][0])


@pytest.mark.parametrize(
    ("labels", "names", "expected", "counts"),
    [
        (["b", "a", "b", "a"], None, ("a", "b"), [1, 1]),
        (["b", "a", "b", "a"], ["b", "a", "c"], ("b", "a"), [1, 1]),
        ([7, 3, 7, 3], None, ("3", "7"), [1, 1]),
        ([2, 0, 2, 0], ["x", "y", "z"], ("x", "z"), [1, 1]),
    ],
)
def test_names_of_classes(labels, names, expected, counts):
    own = data.from_dataset(Samples(pil, labels), class_names=names)
    assert (own.class_names, own.class_counts.tolist()) == (expected, counts)


def test_a_sample_that_cannot_be_read_is_replaced(data_error, capsys):
    def breaking(index):
        if index == 3:
            raise FileNotFoundError(2, "No such file or directory")
        return pil(index)

    own = data.from_dataset(Samples(breaking), Samples(pil), image_size=8, name="mine")
    assert own.train.batch(np.array([3]), seed=0, epoch=0)[1].tolist() == [0]
    assert "warning: mine: training sample 3: cannot be read (No such file" in capsys.readouterr().err
    with data_error("mine: training sample 3: cannot be read"):
        data.from_dataset(Samples(breaking), Samples(pil), image_size=8, name="mine", strict=True).train[3]


class Stream(IterableDataset):
    def __iter__(self):
        yield 0, 0


@pytest.mark.parametrize(
    ("arguments", "options", "texts"),
    [
        ((Stream(),), {}, ("training set: Stream gives no sample by its number",)),
        ((Samples(pil, []),), {}, ("training set: holds no samples",)),
        (([pil(0)],), {}, ("training sample 0: must be (image, label), got Image",)),
        ((Samples(lambda i: "x"),), {}, ("training sample 0: its image must be one of Pillow", "got str")),
        ((Samples(lambda i: torch.zeros(3, 8, 9)),), {}, ("got torch.float32 [3, 8, 9]",)),
        ((Samples(lambda i: np.zeros((8, 9, 3))),), {}, ("got float64 [8, 9, 3]",)),
        ((Samples(lambda i: np.zeros((8, 9, 5), np.uint8)),), {}, ("got uint8 [8, 9, 5]",)),
        ((Samples(pil, attribute=None),), {}, ("has no attribute targets, labels", "labels=[label for _, label in")),
        ((Samples(pil), Samples(pil, attribute=None)), {}, ("test set:", "test_labels=[...]")),
        ((Samples(pil),), {"labels": [0, 1]}, ("2 labels for 12 samples",)),
        ((Samples(pil),), {"labels": [0.5] * 12}, ("must all be whole numbers, or all texts, got float",)),
        ((Samples(pil),), {"labels": [0, "a"] * 6}, ("got int, str",)),
        ((Samples(pil),), {"labels": [[0, 1]] * 12}, ("got list",)),
        ((Samples(pil), Samples(pil, ["a", "b"] * 3)), {}, ("labels of training are int, of test str",)),
        ((Samples(pil), Samples(pil, [3])), {}, ("the class 3 has validation images and none to train on",)),
        ((Samples(pil),), {"class_names": ["a", "b"]}, ("label 2 is outside the 2 class_names, 0 to 1",)),
        ((Samples(pil, ["x", "y"] * 3),), {"class_names": ["x"]}, ("class_names has no 'y'",)),
        ((Samples(pil, [1] * 3),), {}, ("holds one class, 1",)),
        ((Samples(pil),), {"names": ["a"]}, ("1 names for 12 training samples",)),
        (
            (Samples(pil), Samples(finished)),
            {},
            ("test samples are float tensors [3, 16, 16], training samples images",),
        ),
        ((Samples(pil),), {"options": object()}, ("options are those of a loading function",)),
    ],
)
def test_what_is_refused(data_error, arguments, options, texts):
    with data_error("from_dataset", *texts):
        data.from_dataset(*arguments, **options)


def test_labels_that_samples_do_not_have(data_error):
    shifted = Samples(pil)
    shifted.targets = [label + 1 for label in LABELS]
    with data_error("training sample 0: has the label 0, where the attribute of all labels says 1", "labels=[...]"):
        data.from_dataset(shifted)
    assert data.from_dataset(shifted, labels=LABELS).num_classes == 3


def test_samples_that_differ_from_the_first(data_error):
    mixed = data.from_dataset(Samples(lambda i: pil(i) if i < 9 else finished(i)), Samples(pil))
    with data_error("training sample 9: is a float tensor, where the first one was an image"):
        mixed.train.store.open(9)
    sizes = data.from_dataset(Samples(lambda i: torch.zeros(3, 8 + (i == 2), 8 + (i == 2))), Samples(finished_8))
    with data_error("sample 2: expected a float32 tensor [3, 8, 8] like the first one, got torch.float32 [3, 9, 9]"):
        sizes.train[2]


def finished_8(index):
    return torch.zeros(3, 8, 8)


@pytest.mark.parametrize("make", [pil, finished])
def test_it_is_trained_without_being_registered(make, tmp_path):
    own = data.from_dataset(Samples(make), name="mine", **({"image_size": 16} if make is pil else {}))
    small = {
        "model": "resnet8",
        "epochs": 1,
        "stage2_epochs": 0,
        "batch_size": 4,
        "workers": 0,
        "sampler": "class-aware",
    }
    config = resolve({"dataset": "mine", "device": "cpu", **small}, own.info)
    trainer = Trainer(config, own, tmp_path, device=torch.device("cpu"))
    assert (trainer.config.lr, len(trainer.train_loader.epoch(0))) == (own.info.recipe["lr"], 3)
    batch = next(iter(trainer.train_loader.epoch(0)))
    assert batch[0].shape == (4, 3, 16, 16)
    weak = {"sampler": "instance", "weak_augmentation": "rrc" if make is pil else "crop-flip"}
    views = resolve({"dataset": "mine", "method": "mdcs", "device": "cpu", **small, **weak}, own.info)
    if make is pil:
        loader = make_loader(views, own, torch.device("cpu"), train=True)
        assert [view.augmentation for view in loader.views] == ["rrc", own.augmentation]
        assert next(iter(loader.epoch(0)))[0].shape == (8, 3, 16, 16)
    else:
        with pytest.raises(ConfigError, match=r"wants a view with the augmentation 'crop-flip', mine has own"):
            make_loader(views, own, torch.device("cpu"), train=True)
    with pytest.raises(ConfigError, match="unknown data set 'mine'"):
        resolve({"dataset": "mine"})


def test_a_registered_one(monkeypatch, data_error):
    """The six lines of the documentation."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @data.register_dataset(
        data.DatasetInfo("mine", "my own", "from my own code", None, data.photo_augmentations("rrc"), resizable=True)
    )
    def load(info, options):
        return data.from_dataset(Samples(pil), Samples(pil), info=info, options=options)

    own = data.load_dataset("mine", image_size=8, imbalance_factor=6, augmentation="none", seed=3)
    assert (own.name, own.image_size, own.class_counts.tolist()) == ("mine", 8, [6, 2, 1])
    with data_error("mine: has no option val_share, it belongs to 'imagefolder', 'table'"):
        data.load_dataset("mine", val_share=0.1)
