"""Photographs of 500 x 375 to augmented, normalised crops of 224: our loaders against PyTorch's with Pillow.

The peer is what a user has: a ``DataLoader`` whose workers open a file with Pillow, cut a random window, resize it,
flip, and make a normalised tensor of it, one image after the other, with the collating function that comes with it.
Ours read the same files, or packs of them with a short side of 256 pixels, as JPEG or as raw pixels. All have a worker
a core, kept from epoch to epoch, and batches of 64; a call is an epoch of six times 512 images, so that its begin, when
the workers have nothing ready, weighs little. The files are JPEG of quality 90.
"""

import itertools
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photographs
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shike_fast._util.cli import use_device
from shike_fast.data import load_dataset
from shike_fast.data.__main__ import main as data_command
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.stores import Subset
from shike_fast.data.loaders.photo import PhotoLoader

IMAGES, PASSES, BATCH, SIZE = 512, 6, 64, 224
WIDTH, HEIGHT, QUALITY = 500, 375, 90
WORKERS = os.cpu_count() or 1
CASES = dict.fromkeys(("cpu", "cuda"), ("rrc", "rrc-jitter"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PillowDataset(Dataset[tuple[Tensor, int]]):
    """Image files, transformed the way torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter (0.4 each),
    ToTensor and Normalize do it with Pillow."""

    def __init__(self, paths: list[Path], *, jitter: bool) -> None:
        self.paths = paths
        self.jitter = jitter
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = image.crop(self.window(*image.size)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
            for enhancer in random.sample(enhancers, 3):
                image = enhancer(image).enhance(random.uniform(0.6, 1.4))
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return tensor.sub_(self.mean).div_(self.std), 0

    @staticmethod
    def window(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(0.08, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of photographs, and packs of it."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", IMAGES), ("val", 2)):
        for number, image in enumerate(photographs(count, WIDTH, HEIGHT)):
            folder = root / "files" / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.jpg", quality=QUALITY)
    for kind in ("jpeg", "raw"):
        arguments = ["--dataset", "imagefolder", "--data-dir", str(root / "files"), "--format", kind]
        assert data_command(["pack", *arguments, str(root / kind)]) == 0
    return root


def repeated(dataset: ImageDataset) -> ImageDataset:
    """The same images ``PASSES`` times."""
    indices = np.tile(np.arange(len(dataset)), PASSES)
    return ImageDataset(
        Subset(dataset.store, indices),
        dataset.labels[indices],
        augmentation=dataset.augmentation,
        size=SIZE,
        mean=MEAN,
        std=STD,
    )


@pytest.mark.op("image loading")
def test_loader(case, device, photos, side_by_side):
    use_device(device)  # as the commands do, for all contenders
    paths = PASSES * sorted((photos / "files" / "train").rglob("*.jpg"))
    loaders: dict[str, object] = {
        "DataLoader with Pillow": DataLoader(
            PillowDataset(paths, jitter=case == "rrc-jitter"),
            batch_size=BATCH,
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
    }
    for name, folder in (("files", "files"), ("packed JPEG", "jpeg"), ("packed raw", "raw")):
        dataset = repeated(load_dataset("imagefolder", data_dir=photos / folder, augmentation=case).train)
        loaders[name] = PhotoLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS, device=device)
    epochs = itertools.count()

    def load(loader: object) -> None:
        batches: Iterable = loader.epoch(next(epochs)) if isinstance(loader, PhotoLoader) else loader
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    calls = {name: lambda loader=loader: load(loader) for name, loader in loaders.items()}
    side_by_side(calls, images=PASSES * IMAGES, calls=1, rounds=5, facts={name: {} for name in calls})
    for loader in loaders.values():
        if isinstance(loader, PhotoLoader):
            loader.close()
