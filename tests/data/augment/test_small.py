"""The batch augmentations against per-sample references written with plain indexing."""

import pickle
from collections import Counter

import numpy as np
import plain_augmentation as plain
import pytest
import torch
from PIL import Image
from pillow_operations import apply_step

from shike_fast.data.augment import small
from shike_fast.data.augment.autoaugment import CIFAR10_POLICY, Step
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.data.random import STREAM_AUGMENTATION, draw_words, integers, uniform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make(side=32, channels=3, count=60, augmentation="none", seed=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    labels = np.arange(count) % 7
    return ArrayDataset(pixels, labels, mean=MEAN[:channels], std=STD[:channels], augmentation=augmentation, seed=seed)


def normalised(pixels):
    """(x / 255 − mean) / std of one image in float64."""
    channels = len(pixels)
    mean, std = (np.array(v[:channels])[:, None, None] for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


def reference(dataset, index, seed, epoch):
    """One sample, step by step, from its own random words."""
    words = draw_words(seed, epoch, np.array([index]), 10, STREAM_AUGMENTATION)[0]
    image = dataset.images[index]
    channels, side, _ = image.shape
    if dataset.augmentation != "none":
        pad = 4 if side >= 28 else 1
        padded = np.zeros((channels, side + 2 * pad, side + 2 * pad), np.uint8)
        padded[:, pad : pad + side, pad : pad + side] = image
        top, left = (int(integers(words[k], 2 * pad + 1)) for k in (0, 1))
        image = padded[:, top : top + side, left : left + side]
    if dataset.augmentation in ("crop-flip", "cifar") and integers(words[2], 2) == 1:
        image = image[:, :, ::-1]
    if dataset.augmentation == "cifar":
        picture = Image.fromarray(image[0] if channels == 1 else np.ascontiguousarray(np.moveaxis(image, 0, 2)))
        for k, step in enumerate(CIFAR10_POLICY[integers(words[3], 25)]):
            if uniform(words[4 + 2 * k]) < step.probability:
                picture = apply_step(picture, step, 1 if integers(words[5 + 2 * k], 2) else -1)
        image = np.array(picture)[None] if channels == 1 else np.moveaxis(np.array(picture), 2, 0)
        y, x, half = int(integers(words[8], side)), int(integers(words[9], side)), side // 4
        image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return normalised(image)


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop-flip", "cifar"])
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (28, 1), (8, 1)])
def test_a_batch_equals_the_samples_one_by_one(augmentation, side, channels):
    dataset = make(side, channels, augmentation=augmentation)
    indices = np.array([5, 0, 59, 5, 33, *range(20, 50)])
    images, labels = dataset.batch(indices, seed=11, epoch=4)
    assert images.dtype == torch.float32
    assert images.shape == (len(indices), channels, side, side)
    assert labels.dtype == torch.int64
    assert labels.tolist() == (indices % 7).tolist()
    for image, index in zip(images, indices, strict=True):
        np.testing.assert_allclose(image.numpy(), reference(dataset, index, 11, 4), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("augmentation", ["shift", "crop-flip", "cifar"])
def test_seed_and_epoch_change_the_augmentation(augmentation):
    dataset = make(augmentation=augmentation)
    indices = np.arange(60)
    first, _ = dataset.batch(indices, seed=0, epoch=0)
    assert torch.equal(first, dataset.batch(indices, seed=0, epoch=0)[0])
    assert not torch.equal(first, dataset.batch(indices, seed=0, epoch=1)[0])
    assert not torch.equal(first, dataset.batch(indices, seed=1, epoch=0)[0])


def test_indexing_gives_the_sample_of_epoch_zero_under_the_own_seed():
    dataset = make(augmentation="cifar", seed=9)
    expected, labels = dataset.batch(np.array([4, 59]), seed=9, epoch=0)
    image, label = dataset[4]
    assert torch.equal(image, expected[0])
    assert label == labels[0]
    assert torch.equal(dataset[-1][0], expected[1])
    with pytest.raises(IndexError):
        dataset[60]


def test_augmentation_leaves_the_stored_images_alone():
    dataset = make(augmentation="cifar")
    before = dataset.images.copy()
    dataset.batch(np.arange(60), seed=0, epoch=0)
    np.testing.assert_array_equal(dataset.images, before)


def test_a_pickled_data_set_gives_the_same_batch():
    """Worker processes receive it this way where they are not forked."""
    dataset = make(augmentation="cifar")
    copy = pickle.loads(pickle.dumps(dataset))
    expected = dataset.batch(np.arange(9), seed=0, epoch=2)
    for found, tensor in zip(copy.batch(np.arange(9), seed=0, epoch=2), expected, strict=True):
        assert torch.equal(found, tensor)


def test_crop_positions_and_flips_are_uniform():
    """An image whose pixels tell their place gives away the window that was cut."""
    count = 8100
    place = np.arange(1, 32 * 32 + 1) % 256
    pixels = np.broadcast_to(place.astype(np.uint8).reshape(32, 32), (count, 1, 32, 32))
    words = small.AUGMENTATIONS["crop-flip"].draw(np.arange(count), seed=0, epoch=0)
    cropped = plain.random_crop(pixels, words)
    padded = np.pad(pixels[0, 0], 4)
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    found = Counter(windows[image[0].tobytes()] for image in cropped)
    assert len(found) == 81
    assert sum((n - 100) ** 2 / 100 for n in found.values()) < 124.8  # chi-square, 80 degrees of freedom, p = 0.001
    flipped = plain.random_flip(cropped, words)
    share = (flipped != cropped).any((1, 2, 3)).mean()
    assert abs(share - 0.5) < 4 * 0.5 / count**0.5


def test_every_step_of_the_policy_is_applied_as_often_as_it_says(monkeypatch):
    count = 20_000
    applied = Counter()
    signs = Counter()

    def record(image, step, sign):
        applied[step] += 1
        signs[sign] += 1
        return image

    monkeypatch.setattr(plain, "apply_step", record)
    words = small.AUGMENTATIONS["cifar"].draw(np.arange(count), seed=0, epoch=0)
    plain.auto_augment(np.zeros((count, 1, 2, 2), np.uint8), words)
    expected: Counter[Step] = Counter()
    for sub_policy in CIFAR10_POLICY:
        for step in sub_policy:
            expected[step] += step.probability * count / 25
    assert applied[Step("invert", 0.0, 3)] == 0
    for step, number in expected.items():
        assert abs(applied[step] - number) <= 4 * number**0.5, step
    assert set(signs) == {-1, 1}
    assert abs(signs[1] - signs[-1]) < 4 * sum(signs.values()) ** 0.5


def test_sub_policies_are_drawn_uniformly_and_once_per_image(monkeypatch):
    """With every probability at one, an image shows the two steps of its sub-policy and no other."""
    seen = []
    monkeypatch.setattr(plain, "apply_step", lambda image, step, sign: seen.append(step) or image)
    certain = tuple(tuple(Step(f"{k}/{j}", 1.0, 0) for j in range(2)) for k in range(25))
    monkeypatch.setattr(plain, "CIFAR10_POLICY", certain)
    monkeypatch.setattr(small, "CIFAR10_POLICY", certain)
    count = 10_000
    words = small.AUGMENTATIONS["cifar"].draw(np.arange(count), seed=1, epoch=0)
    plain.auto_augment(np.zeros((count, 1, 2, 2), np.uint8), words)
    pairs = Counter(zip(seen[::2], seen[1::2], strict=True))
    assert set(pairs) == set(certain)
    assert sum((n - 400) ** 2 / 400 for n in pairs.values()) < 51.2  # chi-square, 24 degrees of freedom, p = 0.001


def test_the_hole_is_black_not_the_mean():
    """The published order: Cutout, then normalisation."""
    dataset = make(augmentation="cifar")
    dataset.images[:] = 255
    images, _ = dataset.batch(np.arange(60), seed=0, epoch=0)
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    words = dataset.augment.draw(np.arange(60), seed=0, epoch=0)
    for image, y, x in zip(images, integers(words[:, 8], 32), integers(words[:, 9], 32), strict=True):
        torch.testing.assert_close(image[:, y, x], black)


def test_cutout_blackens_one_clipped_square_with_a_uniform_centre():
    count = 4096
    words = small.AUGMENTATIONS["cifar"].draw(np.arange(count), seed=0, epoch=0)
    images = torch.from_numpy(plain.cutout(np.ones((count, 3, 32, 32), np.uint8), words))
    hole = images == 0
    assert torch.equal(hole[:, 0], hole[:, 1])
    rows, columns = hole[:, 0].any(2).sum(1), hole[:, 0].any(1).sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), rows * columns)  # a rectangle
    assert rows.min() == columns.min() == 8  # a centre at the border clips half of it
    assert rows.max() == columns.max() == 16
    # Centres 0 … 31 are equally likely; 8 … 24 keep all 16 rows.
    assert abs((rows == 16).float().mean() - 17 / 32) < 0.04
    covered = hole[:, 0].float().mean(0)
    assert covered[16, 16] > 1.5 * covered[0, 0]


def test_only_the_policy_asks_for_worker_processes():
    assert make(augmentation="cifar").wants_workers
    assert not any(make(augmentation=name).wants_workers for name in ("none", "shift", "crop-flip"))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), np.zeros(2, np.int64)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64)),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, np.int32)),
    ],
)
def test_wrong_arrays_are_refused(images, labels):
    with pytest.raises(ValueError, match="ArrayDataset: expected images uint8"):
        ArrayDataset(images, labels, mean=(0.5,), std=(0.5,))
