"""The batched augmentations against the plain ones: Pillow and NumPy, image by image, equal to the last bit."""

import functools
from collections import Counter

import numpy as np
import plain_augmentation as plain
import pytest
import torch
from pillow_operations import OPERATIONS as PILLOW
from pillow_operations import apply_step
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from shike_fast.data.augment.autoaugment import CIFAR10_POLICY, Step
from shike_fast.data.augment.batched import BatchedAugmentation, images_at_a_time, to_device
from shike_fast.data.augment.operations import LEVELS, OPERATORS, SIGNS, VARIANTS, variant_of
from shike_fast.data.augment.small import AUGMENTATIONS, AutoAugment, Cutout, RandomCrop, RandomFlip, policy_draws
from shike_fast.data.images.arrays import ArrayDataset

CPU = torch.device("cpu")
OPERATIONS = {operation: (operator, k) for operator in OPERATORS for k, operation in enumerate(operator.operations)}
# Pairs of an operator and a step number that no sub-policy has, so that their group is always empty.
LEFT_OUT = sum(
    all(steps[k].operation not in operator.operations for steps in CIFAR10_POLICY)
    for operator in OPERATORS
    for k in range(2)
)
SHAPES = [(c, h, w) for c in (1, 3) for h, w in ((32, 32), (28, 28), (17, 23))]


@functools.cache
def prepare(operator, shape):
    return operator.prepare(shape, CPU)


@functools.cache
def assorted(shape):
    """Noise, gradients, constants, two values, few values, single deviating pixels: uint8 [17, C, H, W]."""
    rng = np.random.default_rng(0)
    y, x = np.indices(shape[1:])
    channel = np.arange(shape[0])[:, None, None]
    images = [rng.integers(0, 256, shape) for _ in range(2)]
    images += [rng.integers(100, 140, shape), np.clip(rng.normal(120, 60, shape), 0, 255)]
    images += [(7 * x + 40 * channel) % 256, (8 * y + 3 * channel) % 256, x + 2 * y + 5 * channel]
    images += [np.full(shape, value) for value in (0, 128, 255)]
    images += [rng.choice(pair, shape) for pair in ((0, 255), (17, 18), (250, 255))]
    images += [rng.choice(values, shape) for values in ((0, 3, 90, 128, 254), (60, 61, 62))]
    for background, spot in ((0, 255), (77, 78)):
        images.append(np.full(shape, background))
        images[-1][:, shape[1] // 2, shape[2] // 3] = spot
    return np.stack(images).astype(np.uint8)


def noise(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def make(augmentation, shape=(3, 32, 32), count=400):
    statistics = {"mean": (0.4, 0.5, 0.6)[: shape[0]], "std": (0.2, 0.25, 0.3)[: shape[0]]}
    dataset = ArrayDataset(noise(count, shape), np.arange(count) % 7, augmentation=augmentation, **statistics)
    return dataset, BatchedAugmentation(dataset.augment, dataset.normalise, shape, CPU)


def test_every_operation_has_its_operator():
    assert set(OPERATIONS) == set(PILLOW)
    assert sum(len(operator.operations) for operator in OPERATORS) == len(PILLOW) == 14


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_equals_that_of_pillow(operation, shape):
    """Every level and sign at once: each image of the batch brings its own variant."""
    operator, k = OPERATIONS[operation]
    images = assorted(shape)
    variants = [(level, sign) for level in range(LEVELS) for sign in SIGNS]
    numbers = [k * VARIANTS + variant_of(level, sign) for level, sign in variants for _ in images]
    batch = torch.from_numpy(np.tile(images, (VARIANTS, 1, 1, 1)))
    before = batch.clone()
    found = operator(batch, prepare(operator, shape)[torch.tensor(numbers)])
    assert torch.equal(batch, before)
    assert found.dtype == torch.uint8
    found = found.unflatten(0, (VARIANTS, len(images))).numpy()
    for (level, sign), of_variant in zip(variants, found, strict=True):
        step = Step(operation, 1.0, level)
        expected = [plain.to_pixels(apply_step(plain.to_image(image), step, sign)) for image in images]
        np.testing.assert_array_equal(of_variant, np.stack(expected), err_msg=f"level {level}, sign {sign}")


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_tiny_images(operation, side):
    operator, k = OPERATIONS[operation]
    images = noise(20, (3, side, 2), seed=1)
    table = prepare(operator, (3, side, 2))[torch.full((20,), k * VARIANTS + variant_of(7, 1))]
    expected = [plain.to_pixels(apply_step(plain.to_image(image), Step(operation, 1.0, 7), 1)) for image in images]
    np.testing.assert_array_equal(operator(torch.from_numpy(images), table).numpy(), np.stack(expected))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 8, 8), (2, 5, 4)], ids=str)
@pytest.mark.parametrize(
    ("step", "oracle"),
    [(RandomCrop, plain.random_crop), (RandomFlip, plain.random_flip), (Cutout, plain.cutout)],
    ids=["crop", "flip", "cutout"],
)
def test_crop_flip_and_cutout_equal_the_plain_ones(step, oracle, shape):
    images = noise(300, shape)
    words = AUGMENTATIONS["cifar"].draw(np.arange(300), seed=2, epoch=1)
    batched = step(shape, CPU)
    found = batched(torch.from_numpy(images.copy()), to_device([batched.plan(words)], CPU)[0])
    np.testing.assert_array_equal(found.numpy(), oracle(images, words))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_equals_the_plain_one(name, shape):
    dataset, batched = make(name, shape)
    indices = np.array([5, 0, 399, 5, *range(20, 380)])
    words = dataset.augment.draw(indices, seed=11, epoch=4)
    expected = plain.augment(dataset.augment, dataset.images[indices], words, dataset.normalise)
    images, _ = dataset.batch(indices, seed=11, epoch=4)
    for found in (batched(torch.from_numpy(dataset.images[indices]), words), images):
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, expected)


def test_an_image_does_not_depend_on_its_neighbours():
    dataset, batched = make("cifar")
    words = dataset.augment.draw(np.arange(400), seed=0, epoch=0)
    together = batched(torch.from_numpy(dataset.images.copy()), words)
    for chosen in ([7], [399, 3], range(100, 130)):
        rows = np.array(chosen)
        assert torch.equal(batched(torch.from_numpy(dataset.images[rows]), words[rows]), together[rows])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_empty_batch(name):
    dataset, batched = make(name)
    words = dataset.augment.draw(np.arange(0), seed=0, epoch=0)
    assert batched(torch.empty(0, 3, 32, 32, dtype=torch.uint8), words).shape == (0, 3, 32, 32)


def test_the_policy_needs_one_channel_or_three():
    with pytest.raises(ValueError, match="AutoAugment: images must have 1 or 3 channels, got 2"):
        AutoAugment((2, 32, 32), CPU)


def test_sub_policies_are_drawn_uniformly_and_for_each_image():
    count = 50_000
    words = AUGMENTATIONS["cifar"].draw(np.arange(count), seed=0, epoch=0)
    policies = policy_draws(words).policies
    found = Counter(policies.tolist())
    assert set(found) == set(range(25))
    assert sum((n - 2000) ** 2 / 2000 for n in found.values()) < 51.2  # chi-square, 24 degrees of freedom, p = 0.001
    assert len(set(policies[:128])) > 20  # neighbours of a batch


def test_every_step_is_planned_as_often_as_the_policy_says():
    count = 50_000
    words = AUGMENTATIONS["cifar"].draw(np.arange(count), seed=0, epoch=0)
    draws = policy_draws(words)
    plan = AutoAugment((1, 4, 4), CPU).plan(words)
    assert len(plan) == 2 * 2 * len(OPERATORS)
    planned: Counter[tuple[int, int, int]] = Counter()  # sub-policy, first or second step, sign
    for k in range(2):
        half = plan[2 * len(OPERATORS) * k :][: 2 * len(OPERATORS)]
        assert len(np.unique(np.concatenate(half[::2]))) == sum(
            map(len, half[::2])
        )  # an image has one operator at most
        for operator, positions, variants in zip(OPERATORS, half[::2], half[1::2], strict=True):
            for policy, variant in zip(draws.policies[positions], variants, strict=True):
                step = CIFAR10_POLICY[policy][k]
                level, sign = divmod(variant % VARIANTS, 2)
                assert operator.operations[variant // VARIANTS] == step.operation
                assert level == step.level
                planned[policy, k, sign] += 1
    for policy, steps in enumerate(CIFAR10_POLICY):
        for k, step in enumerate(steps):
            minus, plus = (planned[policy, k, sign] for sign in (0, 1))
            expected = step.probability * count / 25
            assert abs(minus + plus - expected) <= 4 * expected**0.5
            assert abs(minus - plus) <= 4 * (minus + plus) ** 0.5


def without_values():
    """Within it tensors have no values: reading one, or a shape that depends on one, raises."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def test_tensors_without_values_tell_a_reading():
    tensor = torch.arange(3)
    for read in (torch.nonzero, lambda t: t[t > 1], torch.bincount, lambda t: t.sum().item()):
        with without_values() as mode, pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            read(mode.from_tensor(tensor))


def test_nothing_reads_from_the_device():
    dataset, batched = make("cifar", count=2000)
    words = dataset.augment.draw(np.arange(2000), seed=0, epoch=0)
    plans = to_device(batched.plan(words), CPU)
    assert sum(len(array) == 0 for array in plans[2]) == 2 * LEFT_OUT
    images = torch.from_numpy(dataset.images)
    with without_values() as mode:
        plans = [[mode.from_tensor(array) for array in plan] for plan in plans]
        result = batched.normalise(batched.augment(mode.from_tensor(images), plans))
    assert isinstance(result, FakeTensor)
    assert result.shape == (2000, 3, 32, 32)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: "-".join(operator.operations))
@pytest.mark.parametrize("channels", [1, 3])
def test_no_operator_reads_from_the_device(operator, channels):
    shape = (channels, 8, 8)
    variants = prepare(operator, shape)[:5]
    with without_values() as mode:
        result = operator(mode.from_tensor(torch.zeros(5, *shape, dtype=torch.uint8)), mode.from_tensor(variants))
    assert isinstance(result, FakeTensor)
    assert result.shape == (5, *shape)


class Count(TorchDispatchMode):
    """Counts the calls that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_the_number_of_launches_is_the_same_for_every_epoch_and_batch():
    dataset, batched = make("cifar", count=1000)
    calls = []
    for epoch, count in ((0, 1000), (1, 1000), (2, 800)):
        words = dataset.augment.draw(np.arange(count), seed=0, epoch=epoch)
        assert sum(len(array) == 0 for array in batched.plan(words)[2]) == 2 * LEFT_OUT
        with Count() as counter:
            batched(torch.from_numpy(dataset.images[:count]), words)
        calls.append(counter.calls)
    assert len(set(calls)) == 1
    assert calls[0] < 600


def test_operations_take_a_bounded_number_of_images_at_a_time():
    """Their temporary results are fifty times as large."""
    image = 3 * 224 * 224
    assert images_at_a_time(torch.device("cuda"), image) * image * 50 <= 2**29
    assert images_at_a_time(torch.device("cpu"), image) == 6
    for device in ("cpu", "cuda"):
        assert images_at_a_time(torch.device(device), 2**40) == 1
