"""Every operation against an expectation computed here with NumPy."""

import math

import numpy as np
import pytest
from PIL import Image
from pillow_operations import apply_step

from shike_fast.data.augment.autoaugment import CIFAR10_POLICY, MAGNITUDES, Step

SIDE = 32


@pytest.fixture
def pixels():
    rng = np.random.default_rng(0)
    return rng.integers(20, 220, (SIDE, SIDE, 3), dtype=np.uint8)


def apply(pixels, operation, level, sign=1):
    return np.asarray(apply_step(Image.fromarray(pixels), Step(operation, 1.0, level), sign))


def luma(pixels):
    """ITU-R 601-2 in Pillow's fixed point."""
    r, g, b = (pixels[..., c].astype(np.int64) for c in range(3))
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


def blend(degenerate, pixels, factor):
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255)


def test_the_policy_has_25_sub_policies_of_known_operations():
    assert len(CIFAR10_POLICY) == 25
    names = {step.operation for sub_policy in CIFAR10_POLICY for step in sub_policy}
    assert names == {
        *("invert", "contrast", "rotate", "translate_x", "translate_y", "sharpness", "shear_y", "autocontrast"),
        *("equalize", "posterize", "color", "brightness", "solarize"),
    }
    assert all(0 <= step.probability <= 1 and 0 <= step.level <= 9 for pair in CIFAR10_POLICY for step in pair)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, (("invert", 0.1, 7), ("contrast", 0.2, 6))),
        (1, (("rotate", 0.7, 2), ("translate_x", 0.3, 9))),
        (5, (("shear_y", 0.2, 7), ("posterize", 0.3, 7))),
        (14, (("solarize", 0.5, 2), ("invert", 0.0, 3))),
        (24, (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1))),
    ],
)
def test_sub_policies_of_the_paper(index, expected):
    assert CIFAR10_POLICY[index] == expected


def test_magnitudes():
    assert MAGNITUDES["shear_y"][9] == pytest.approx(0.3)
    assert MAGNITUDES["translate_x"][9] == pytest.approx(150 / 331)
    assert MAGNITUDES["rotate"][2] == pytest.approx(20 / 3)
    assert MAGNITUDES["posterize"].tolist() == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert MAGNITUDES["solarize"][0] == 256
    assert MAGNITUDES["solarize"][9] == 0
    assert MAGNITUDES["brightness"][5] == pytest.approx(0.5)


def test_invert(pixels):
    np.testing.assert_array_equal(apply(pixels, "invert", 7), 255 - pixels)


@pytest.mark.parametrize("level", range(10))
def test_solarize(pixels, level):
    threshold = 256 * (1 - level / 9)
    np.testing.assert_array_equal(apply(pixels, "solarize", level), np.where(pixels < threshold, pixels, 255 - pixels))


@pytest.mark.parametrize(("level", "bits"), [(0, 8), (3, 7), (7, 5), (9, 4)])
def test_posterize(pixels, level, bits):
    np.testing.assert_array_equal(apply(pixels, "posterize", level), pixels & (0xFF << (8 - bits) & 0xFF))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0, 3, 9])
def test_brightness_contrast_color(pixels, level, sign):
    factor = 1 + sign * level / 10
    expectations = {
        "brightness": blend(0.0, pixels, factor),
        "contrast": blend(float(int(luma(pixels).mean() + 0.5)), pixels, factor),
        "color": blend(luma(pixels)[..., None], pixels, factor),
    }
    for operation, expected in expectations.items():
        found = apply(pixels, operation, level, sign)
        assert np.abs(found - expected).max() < 1.001, operation  # Pillow truncates


@pytest.mark.parametrize("sign", [-1, 1])
def test_sharpness(pixels, sign):
    factor = 1 + sign * 0.6
    image = pixels.astype(float)
    neighbourhood = sum(np.roll(image, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    smooth = np.rint((neighbourhood + 4 * image) / 13)  # all neighbours weigh 1, the centre 5
    expected = blend(smooth, pixels, factor)[1:-1, 1:-1]
    assert np.abs(apply(pixels, "sharpness", 6, sign)[1:-1, 1:-1] - expected).max() < 1.001 + abs(1 - factor)


def test_autocontrast(pixels):
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    expected = (pixels - low) * 255 / (high - low)
    found = apply(pixels, "autocontrast", 8)
    assert np.abs(found - expected).max() < 1.001
    assert (found.min((0, 1)) == 0).all()
    assert (found.max((0, 1)) == 255).all()


def test_equalize(pixels):
    found = apply(pixels, "equalize", 2)
    for c in range(3):
        channel = pixels[..., c]
        histogram = np.bincount(channel.ravel(), minlength=256)
        step = (histogram.sum() - histogram[channel.max()]) // 255
        below = np.cumsum(histogram) - histogram
        np.testing.assert_array_equal(found[..., c], np.minimum((below + step // 2) // step, 255)[channel])


@pytest.mark.parametrize("operation", ["translate_x", "translate_y"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_translate(pixels, operation, sign):
    share = 150 / 331 * 9 / 9
    axis = 1 if operation == "translate_x" else 0
    source = np.floor(np.arange(SIDE) + 0.5 + sign * share * SIDE).astype(int)  # output -> input, nearest
    inside = (source >= 0) & (source < SIDE)
    expected = np.full_like(pixels, 128)
    target = [slice(None)] * 2
    target[axis] = inside
    expected[tuple(target)] = np.take(pixels, source[inside], axis=axis)
    np.testing.assert_array_equal(apply(pixels, operation, 9, sign), expected)
    assert (~inside).sum() in (14, 15)


@pytest.mark.parametrize("operation", ["shear_x", "shear_y"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_shear(operation, sign):
    """Pillow's bicubic filter keeps a ramp to a tenth of a pixel (6 grey levels a pixel here), then truncates."""
    along = 1 if operation == "shear_x" else 0
    position = np.indices((SIDE, SIDE)).astype(float)
    ramp = np.repeat((10 + 6 * position[along])[..., None], 3, axis=2).astype(np.uint8)
    source = position[along] + sign * MAGNITUDES[operation][8] * (position[1 - along] + 0.5)
    found = apply(ramp, operation, 8, sign)[..., 0]
    inner = (source > 2) & (source < SIDE - 3)
    assert inner.sum() > 300
    assert np.abs(found - (10 + 6 * source))[inner].max() < 1.6
    outside = (source < -0.5) | (source > SIDE - 0.5)
    assert outside.sum() > 50
    assert (found[outside] == 128).all()


def test_rotate_is_counter_clockwise_nearest_and_filled_with_grey(pixels):
    angle = math.radians(20 / 3)
    y, x = np.indices((SIDE, SIDE)) + 0.5 - SIDE / 2
    # Counter-clockwise on the screen (y points down): output (x, y) comes from the input turned clockwise.
    source_x = np.floor(math.cos(angle) * x - math.sin(angle) * y + SIDE / 2).astype(int)
    source_y = np.floor(math.sin(angle) * x + math.cos(angle) * y + SIDE / 2).astype(int)
    inside = (source_x >= 0) & (source_x < SIDE) & (source_y >= 0) & (source_y < SIDE)
    expected = np.full_like(pixels, 128)
    expected[inside] = pixels[source_y[inside], source_x[inside]]
    for sign in (-1, 1):  # rotation has no random direction in the published policy
        assert (apply(pixels, "rotate", 2, sign) == expected).all(-1).mean() > 0.99


def test_rotate_direction():
    """A mark right of the centre moves up."""
    pixels = np.zeros((33, 33, 3), np.uint8)
    pixels[16, 30] = 255
    rows, _ = np.nonzero(apply(pixels, "rotate", 9).max(-1) == 255)
    assert (rows < 12).all()


@pytest.mark.parametrize(
    "operation", ["color", *sorted(set(MAGNITUDES) - {"color"}), "autocontrast", "equalize", "invert"]
)
def test_grey_images_stay_grey(pixels, operation):
    grey = pixels[..., 0]
    found = apply_step(Image.fromarray(grey), Step(operation, 1.0, 9), 1)
    assert found.mode == "L"
    assert found.size == (SIDE, SIDE)
    if operation == "color":
        np.testing.assert_array_equal(np.asarray(found), grey)
    else:
        assert (np.asarray(found) != grey).any()
    if operation in ("translate_x", "rotate"):
        assert (np.asarray(found)[0, -1]) == 128
