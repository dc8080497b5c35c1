"""Flip, colour jitter and RandAugment of photographs: the plain form against Pillow, the batched one against that."""

import functools
from collections import Counter

import numpy as np
import plain_augmentation as plain
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from plain_augmentation import colour_jitter, photo_flip, rand_augment, to_image, to_pixels
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shike_fast.data.augment import batched as batched_module
from shike_fast.data.augment.autoaugment import MAGNITUDES
from shike_fast.data.augment.batched import BatchedAugmentation, Normalise, to_device
from shike_fast.data.augment.crop import CROP_WORDS
from shike_fast.data.augment.photo import (
    PHOTO_AUGMENTATIONS,
    RAND_AUGMENT,
    WORDS,
    ColourJitter,
    PhotoFlip,
    RandAugment,
    jitter_draws,
    photo_augmentations,
    rand_draws,
)

CPU = torch.device("cpu")
NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EVERYTHING = "rrc-jitter-randaugment"
TRAINING = [name for name in PHOTO_AUGMENTATIONS if name != "none"]
SHAPES = [(3, 1, 1), (3, 2, 2), (3, 1, 9), (3, 7, 2), (3, 17, 23), (3, 32, 32)]
FILL = (128, 128, 128)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The images are few and small: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def affine(matrix, resample):
    kind = Image.Transform.AFFINE
    return lambda image: image.transform(image.size, kind, matrix(*image.size), resample, fillcolor=FILL)


# What every operation is to do, with a sign where it has one.
EXPECTED = {
    "identity": lambda sign: lambda image: image,
    "autocontrast": lambda sign: ImageOps.autocontrast,
    "equalize": lambda sign: ImageOps.equalize,
    "rotate": lambda sign: lambda image: image.rotate(30 * sign, Image.Resampling.NEAREST, fillcolor=FILL),
    "solarize": lambda sign: lambda image: ImageOps.solarize(image, 256),
    "color": lambda sign: lambda image: ImageEnhance.Color(image).enhance(1.9),
    "posterize": lambda sign: lambda image: ImageOps.posterize(image, 4),
    "contrast": lambda sign: lambda image: ImageEnhance.Contrast(image).enhance(1.9),
    "brightness": lambda sign: lambda image: ImageEnhance.Brightness(image).enhance(1.9),
    "sharpness": lambda sign: lambda image: ImageEnhance.Sharpness(image).enhance(1.9),
    "shear_x": lambda sign: affine(lambda w, h: (1, 0.3 * sign, 0, 0, 1, 0), Image.Resampling.BICUBIC),
    "shear_y": lambda sign: affine(lambda w, h: (1, 0, 0, 0.3 * sign, 1, 0), Image.Resampling.BICUBIC),
    "translate_x": lambda sign: affine(lambda w, h: (1, 0, 0.45 * w * sign, 0, 1, 0), Image.Resampling.NEAREST),
    "translate_y": lambda sign: affine(lambda w, h: (1, 0, 0, 0, 1, 0.45 * h * sign), Image.Resampling.NEAREST),
}
SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
NAMES = [operation.operation for operation in RAND_AUGMENT]


@functools.cache
def photos(count, shape, seed=0):
    """Noise, smooth images, few values and constants, uint8 [count, C, H, W]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape))
    y, x = np.indices(shape[1:])
    for b in range(1, count, 4):
        wave = np.sin(x / 9 + rng.uniform(0, 6)) + np.cos(y / 7 + rng.uniform(0, 6))
        images[b] = 128 + 60 * wave + rng.normal(0, 3, shape) + rng.integers(-40, 40, (shape[0], 1, 1))
        if b + 1 < count:
            images[b + 1] = rng.choice(rng.integers(0, 256, 3), shape)
        if b + 2 < count and b % 8 == 1:
            images[b + 2] = rng.integers(0, 256, (shape[0], 1, 1))
    pixels = np.clip(images, 0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


def words_of(count, seed=0, epoch=0):
    return PHOTO_AUGMENTATIONS[EVERYTHING].draw(np.arange(count), seed=seed, epoch=epoch)


@functools.cache
def make(name, shape):
    return BatchedAugmentation(PHOTO_AUGMENTATIONS[name], NORMALISE, shape, CPU)


def run(step, images, words):
    """A batched step on NumPy images."""
    return step(torch.from_numpy(images.copy()), to_device([step.plan(words)], CPU)[0]).numpy()


def word_for(number, count):
    """A random word that draws ``number`` out of ``count``."""
    return -(-(number << 32) // count)


def words_for(count, *draws):
    """Words by which each image has these operations, pairs of name and sign."""
    words = np.zeros((count, WORDS), np.uint32)
    for k, (operation, sign) in enumerate(draws):
        words[:, CROP_WORDS + 5 + k] = word_for(NAMES.index(operation), 14)
        words[:, CROP_WORDS + 7 + k] = 2**31 if sign > 0 else 0
    return words


def test_every_training_augmentation_has_the_same_words():
    """So the crop, the flip and the factors of a sample are the same in each. The first 27 words are as ever."""
    assert CROP_WORDS == 22
    assert WORDS == 22 + 1 + 4 + 4
    indices = np.arange(50)
    expected = words_of(50, seed=3, epoch=2)
    for name in TRAINING:
        np.testing.assert_array_equal(PHOTO_AUGMENTATIONS[name].draw(indices, seed=3, epoch=2), expected)
    none = PHOTO_AUGMENTATIONS["none"]
    assert (none.words, none.steps) == (0, ())


def test_flip():
    images, words = photos(40, (3, 5, 6)), words_of(40)
    mirrored = words[:, 22] >= 2**31
    assert 10 < mirrored.sum() < 30
    expected = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    np.testing.assert_array_equal(photo_flip(images, words), expected)
    np.testing.assert_array_equal(run(PhotoFlip((3, 5, 6), CPU), images, words), expected)


def test_names_with_the_default_first_and_none_last():
    assert photo_augmentations("rrc") == (*(name for name in PHOTO_AUGMENTATIONS if name != "none"), "none")
    assert photo_augmentations("rrc-jitter")[:2] == ("rrc-jitter", "rrc")


@pytest.mark.parametrize("form", ["plain", "batched"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 17, 23), (3, 64, 64)], ids=str)
def test_jitter_is_what_the_words_say(form, shape):
    """Order and factors come from words 23 and 24 to 26."""
    images, words = photos(60, shape), words_of(60, seed=4)
    found = colour_jitter(images, words) if form == "plain" else run(ColourJitter(shape, CPU), images, words)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    seen = set()
    for pixels, row, result in zip(images, words, found, strict=True):
        image = to_image(pixels)
        order = orders[int(row[23]) * 6 >> 32]
        seen.add(order)
        for k in order:
            image = enhancers[k](image).enhance(1 + 0.4 * (2 * (int(row[24 + k]) / 2**32) - 1))
        np.testing.assert_array_equal(result, to_pixels(image))
    assert len(seen) == 6


def test_jitter_at_the_ends_of_its_range():
    images = photos(24, (3, 9, 9))
    for word in (0, 2**31, 2**32 - 1):
        words = np.zeros((24, WORDS), np.uint32)
        words[:, 24:27] = word
        words[:, 23] = [word_for(b % 6, 6) for b in range(24)]
        found = run(ColourJitter((3, 9, 9), CPU), images, words)
        np.testing.assert_array_equal(found, colour_jitter(images, words))
        assert (found == images).all() == (word == 2**31)  # a factor of 1


def test_jitter_factors_are_uniform_and_its_orders_equally_frequent():
    order, factors = jitter_draws(words_of(20_000))
    assert np.abs(np.quantile(factors, (0, 0.25, 0.5, 0.75, 1), axis=0).T - (0.6, 0.8, 1, 1.2, 1.4)).max() < 0.015
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.03
    found = Counter(map(tuple, order.tolist()))
    assert len(found) == 6
    assert sum((n - 20_000 / 6) ** 2 / (20_000 / 6) for n in found.values()) < 20.5  # 5 degrees of freedom, p = 0.001


def test_the_operations_are_the_fourteen_of_the_paper():
    assert list(EXPECTED) == NAMES
    assert {operation.operation for operation in RAND_AUGMENT if operation.signed} == SIGNED


@pytest.mark.parametrize("form", ["plain", "batched"])
@pytest.mark.parametrize("operation", EXPECTED)
def test_an_operation_is_that_of_pillow(operation, form):
    for shape in [(3, 1, 1), (3, 2, 2), (3, 17, 23), (3, 32, 32), (3, 224, 224)]:
        images = photos(2 if shape[1] == 224 else 9, shape)
        augment = functools.partial(run, rand_step(shape)) if form == "batched" else rand_augment
        for sign in (-1, 1):
            expected = np.stack([to_pixels(EXPECTED[operation](sign)(to_image(pixels))) for pixels in images])
            for draws in ([(operation, sign), ("identity", 1)], [("identity", -1), (operation, sign)]):
                found = augment(images, words_for(len(images), *draws))
                np.testing.assert_array_equal(found, expected, err_msg=f"{shape}, sign {sign}")


@functools.cache
def rand_step(shape):
    return RandAugment(shape, CPU)


@pytest.mark.parametrize("operation", ["identity", "solarize"])
def test_two_operations_leave_an_image_as_it_is(operation):
    images = photos(5, (3, 8, 8))
    words = words_for(5, (operation, 1), (operation, -1))
    np.testing.assert_array_equal(rand_augment(images, words), images)
    assert all(len(array) == 0 for array in rand_step((3, 8, 8)).plan(words))


def test_operations_are_applied_in_the_order_drawn():
    images = photos(6, (3, 20, 20))
    there = words_for(6, ("rotate", 1), ("equalize", 1))
    back = words_for(6, ("equalize", 1), ("rotate", 1))
    assert (rand_augment(images, there) != rand_augment(images, back)).any()
    for words in (there, back):
        np.testing.assert_array_equal(run(rand_step((3, 20, 20)), images, words), rand_augment(images, words))


def test_operations_and_signs_are_drawn_uniformly_and_independently():
    count = 56_000
    operations, signs = rand_draws(words_of(count))
    pairs = Counter(zip(*operations.T.tolist(), strict=True))
    assert len(pairs) == 14 * 14
    expected = count / 14**2
    # Uniform pairs: 195 degrees of freedom, p = 0.001.
    assert sum((n - expected) ** 2 / expected for n in pairs.values()) < 262
    for k in range(2):
        for number in range(14):
            assert abs(signs[operations[:, k] == number, k].mean()) < 4 / (count / 14) ** 0.5
    assert abs((signs[:, 0] * signs[:, 1]).mean()) < 4 / count**0.5
    assert len(set(operations[:128, 0])) > 10  # neighbours of a batch


def test_the_plan_serves_every_image_that_an_operation_changes():
    words = words_of(3000)
    operations, _ = rand_draws(words)
    step = rand_step((3, 8, 8))
    plan = step.plan(words)
    half = len(plan) // 2
    for k, arrays in enumerate((plan[:half], plan[half:])):
        positions = np.concatenate(arrays[::2])
        wanted = np.flatnonzero(~np.isin(operations[:, k], [NAMES.index("identity"), NAMES.index("solarize")]))
        np.testing.assert_array_equal(np.sort(positions), wanted)


def test_tables_hold_only_what_can_be_drawn():
    """A row of a moving operation has a number for each pixel: rotation and two translations, to either side."""
    sizes = [len(table) for table in rand_step((3, 8, 8))._tables]
    assert sum(sizes) == 7 + 2 * len(SIGNED)
    assert max(sizes) == 6


@pytest.mark.parametrize("shape", [*SHAPES, (3, 224, 224)], ids=str)
@pytest.mark.parametrize("name", PHOTO_AUGMENTATIONS)
def test_an_augmentation_equals_the_plain_one(name, shape):
    count = 8 if shape[1] == 224 else 60
    augmentation = PHOTO_AUGMENTATIONS[name]
    images = photos(count, shape)
    words = augmentation.draw(np.arange(count), seed=11, epoch=4)
    expected = plain.augment(augmentation, images.copy(), words, NORMALISE)
    found = make(name, shape)(torch.from_numpy(images.copy()), words)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", PHOTO_AUGMENTATIONS)
def test_an_empty_batch(name):
    words = PHOTO_AUGMENTATIONS[name].draw(np.arange(0), seed=0, epoch=0)
    found = make(name, (3, 32, 32))(torch.empty(0, 3, 32, 32, dtype=torch.uint8), words)
    assert found.shape == (0, 3, 32, 32)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 7 * 9 * 10, 2**40])
def test_an_image_depends_neither_on_its_neighbours_nor_on_the_chunks(chunk_bytes, monkeypatch):
    images, words = photos(60, (3, 7, 9)), words_of(60)
    augmentation = make(EVERYTHING, (3, 7, 9))
    together = augmentation(torch.from_numpy(images.copy()), words)
    monkeypatch.setitem(batched_module._CHUNK_BYTES, "cpu", chunk_bytes)
    for rows in ([7], [59, 3], range(20, 50), range(60)):
        chosen = np.array(rows)
        assert torch.equal(augmentation(torch.from_numpy(images[chosen]), words[chosen]), together[chosen])


@pytest.mark.parametrize("step", [RandAugment, ColourJitter])
def test_one_channel_or_three(step):
    with pytest.raises(ValueError, match=f"{step.__name__}: images must have 1 or 3 channels, got 2"):
        step((2, 32, 32), CPU)
    images, words = photos(40, (1, 9, 8)), words_of(40)
    np.testing.assert_array_equal(run(step((1, 9, 8), CPU), images, words), plain.STEPS[step](images, words))


@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_of_a_sheared_image_move_as_wholes(sign):
    """The batched shear relies on it: from any magnitude in use, all pixels of a row have the same whole distance."""
    centre = np.arange(640) + 0.5
    for magnitude in {*MAGNITUDES["shear_x"], 0.3}:
        source = centre + sign * magnitude * centre[:, None]
        distance = np.floor(source - 0.5) - np.arange(640)
        end = distance[:, 0] if sign > 0 else distance[:, -1]
        assert ((distance == end[:, None]) | (source < 0)).all()


def without_values():
    """Within it tensors have no values: reading one, or a shape that depends on one, raises."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def test_nothing_reads_from_the_device():
    shape = (3, 16, 16)
    augmentation, words = make(EVERYTHING, shape), words_of(400)
    plans = to_device(augmentation.plan(words), CPU)
    assert all(len(array) for plan in plans for array in plan)
    with without_values() as mode:
        plans = [[mode.from_tensor(array) for array in plan] for plan in plans]
        images = mode.from_tensor(torch.zeros(400, *shape, dtype=torch.uint8))
        result = augmentation.normalise(augmentation.augment(images, plans))
    assert isinstance(result, FakeTensor)
    assert result.shape == (400, *shape)


def test_everything_happens_on_the_device():
    """The device "meta" holds no values: they cannot be read, and its tensors do not mix with those of the CPU."""
    meta = torch.device("meta")
    augmentation = BatchedAugmentation(PHOTO_AUGMENTATIONS[EVERYTHING], NORMALISE, (3, 16, 16), meta)
    result = augmentation(torch.empty(300, 3, 16, 16, dtype=torch.uint8, device=meta), words_of(300))
    assert result.is_meta
    assert result.shape == (300, 3, 16, 16)


class Count(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, without those that only make a view."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += not function.is_view
        return function(*args, **(kwargs or {}))


def test_the_number_of_launches_is_the_same_for_every_epoch_and_batch():
    meta = torch.device("meta")  # a CPU takes on a chunk at a time
    augmentation = BatchedAugmentation(PHOTO_AUGMENTATIONS[EVERYTHING], NORMALISE, (3, 8, 8), meta)
    calls = []
    for epoch, count in ((0, 400), (1, 400), (2, 3000)):
        words = words_of(count, epoch=epoch)
        with Count() as counter:
            augmentation(torch.empty(count, 3, 8, 8, dtype=torch.uint8, device=meta), words)
        calls.append(counter.calls)
    assert len(set(calls)) == 1
    assert calls[0] < 600


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 224, 224), (3, 17, 23)], ids=str)
@pytest.mark.parametrize("name", PHOTO_AUGMENTATIONS)
def test_cuda_gives_what_the_cpu_gives_and_is_never_waited_for(name, shape):
    device = torch.device("cuda")
    augmentation = BatchedAugmentation(PHOTO_AUGMENTATIONS[name], NORMALISE, shape, device)
    images, words = photos(128, shape), PHOTO_AUGMENTATIONS[name].draw(np.arange(128), seed=1, epoch=0)
    expected = make(name, shape)(torch.from_numpy(images.copy()), words)
    on_device = torch.from_numpy(images.copy()).to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augmentation(on_device, words)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
