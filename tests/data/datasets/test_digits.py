import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from shike_fast.data import BatchSource, load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits-lt")


def test_counts_and_shape(digits):
    expected = [int(114 * (1 / 20) ** (c / 9)) for c in range(10)]
    assert digits.class_counts.dtype == torch.int64
    assert digits.class_counts.tolist() == expected
    assert np.bincount(digits.train.labels).tolist() == expected
    assert np.bincount(digits.test.labels).tolist() == [60] * 10
    assert (digits.in_channels, digits.image_size, digits.num_classes) == (1, 8, 10)
    assert digits.class_names == tuple("0123456789")
    assert (digits.imbalance_factor, digits.augmentation) == (20.0, "shift")
    assert isinstance(digits.train, BatchSource)


def test_samples_are_normalised(digits):
    image, label = digits.test[0]
    assert (image.shape, image.dtype, label) == ((1, 8, 8), torch.float32, digits.test.labels[0])
    images, _ = digits.test.batch(np.arange(600), seed=0, epoch=0)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_training_and_test_images_are_different_ones():
    balanced = load_dataset("digits-lt", imbalance_factor=1)
    assert balanced.class_counts.tolist() == [114] * 10
    seen = {image.tobytes() for image in balanced.train.images}
    assert not any(image.tobytes() in seen for image in balanced.test.images)


def test_the_images_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    bundle = load_digits()
    known = {
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bundle.images, bundle.target, strict=True)
    }
    for part in (digits.train, digits.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert (image.tobytes(), int(label)) in known


def test_the_split_never_follows_the_seed(digits):
    other = load_dataset("digits-lt", seed=5)
    assert other.fingerprint == digits.fingerprint
    np.testing.assert_array_equal(other.test.images, digits.test.images)
    assert not torch.equal(other.train[0][0], digits.train[0][0]) or not torch.equal(
        other.train[1][0], digits.train[1][0]
    )


def test_the_fingerprint_follows_the_training_set(digits):
    assert load_dataset("digits-lt", imbalance_factor=10).fingerprint != digits.fingerprint
    assert load_dataset("digits-lt", augmentation="none").fingerprint == digits.fingerprint


def test_a_tail_without_images_is_refused(data_error):
    with data_error("imbalance_factor 200 leaves class 9 without", "at most 114"):
        load_dataset("digits-lt", imbalance_factor=200)


def test_a_plain_torch_loader_can_use_it(digits):
    images, labels = next(iter(DataLoader(digits.test, batch_size=4)))
    expected = digits.test.batch(np.arange(4), seed=0, epoch=0)
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


def test_another_image_size_is_resized_once(digits):
    large = load_dataset("digits-lt", image_size=32)
    assert (large.image_size, large.train.images.shape[1:], large.test.images.dtype) == (32, (1, 32, 32), np.uint8)
    assert large.fingerprint == digits.fingerprint and large.class_counts.tolist() == digits.class_counts.tolist()
    assert large.test[0][0].shape == (1, 32, 32)
    for mine, original in ((large.train.images, digits.train.images), (large.test.images, digits.test.images)):
        theirs = [Image.fromarray(image[0]).resize((32, 32), Image.Resampling.BILINEAR) for image in original]
        assert np.abs(mine[:, 0].astype(int) - np.stack(theirs).astype(int)).max() <= 1  # Pillow rounds twice
    assert np.array_equal(load_dataset("digits-lt", image_size=8).train.images, digits.train.images)
