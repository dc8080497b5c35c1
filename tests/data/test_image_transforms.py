import math

import numpy as np
import pytest
from PIL import Image

from shike_fast.data._random import STREAM_AUGMENTATION, draw_words
from shike_fast.data.image_transforms import ATTEMPTS, WORDS, evaluation_transform, random_crop_box, train_transform

FULL = 2**32 - 1


def words_of(count, seed=0):
    return draw_words(seed, 0, np.arange(count), WORDS, STREAM_AUGMENTATION)


@pytest.fixture
def photo():
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((192, 144), Image.Resampling.BICUBIC)


def test_crop_boxes_lie_inside_with_the_published_areas_and_ratios():
    width, height = 500, 375
    boxes = np.array([random_crop_box(width, height, words) for words in words_of(4000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    areas = (right - left) * (bottom - top) / (width * height)
    ratios = (right - left) / (bottom - top)
    assert areas.min() > 0.078 and areas.max() <= 1
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    # Up to an area of 0.56 every ratio fits this image, so nothing was rejected: uniform area, log-uniform ratio.
    small = areas < 0.55
    assert small.sum() > 1500
    assert np.quantile(areas[small], (0.25, 0.5, 0.75)) == pytest.approx(
        0.08 + 0.47 * np.array((0.25, 0.5, 0.75)), abs=0.02
    )
    assert np.abs(np.log(ratios[small])).mean() == pytest.approx(math.log(4 / 3) / 2, rel=0.05)
    assert np.log(ratios[small]).mean() == pytest.approx(0, abs=0.02)
    slack = (left / np.maximum(width - (right - left), 1))[right - left < width]
    assert slack.mean() == pytest.approx(0.5, abs=0.03)


def test_the_window_is_what_the_words_say():
    words = np.zeros(WORDS, np.uint32)
    words[0] = 2**31  # area 0.54
    words[ATTEMPTS] = 2**31  # ratio 1
    words[2 * ATTEMPTS] = FULL  # top: as low as possible
    side = round(math.sqrt(0.54 * 100 * 100))
    assert random_crop_box(100, 100, words) == (0, 100 - side, side, 100)


def test_a_later_attempt_is_used_when_the_first_does_not_fit():
    words = np.zeros(WORDS, np.uint32)
    words[0] = FULL  # the whole area at ratio 3/4 does not fit a square
    words[1], words[ATTEMPTS + 1] = 2**30, 2**31  # area 0.31, ratio 1
    side = round(math.sqrt((0.08 + 0.92 / 4) * 100 * 100))
    assert random_crop_box(100, 100, words) == (0, 0, side, side)


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520)), ((40, 36), (0, 0, 40, 36))]
)
def test_the_centre_is_used_when_nothing_fits(size, box):
    words = np.zeros(WORDS, np.uint32)
    words[:ATTEMPTS] = FULL  # ten times the whole area at ratio 3/4
    assert random_crop_box(*size, words) == box


def test_a_one_pixel_image_has_a_crop():
    for words in words_of(20):
        assert random_crop_box(1, 1, words) == (0, 0, 1, 1)


def test_train_transform_crops_resizes_and_flips(photo):
    seen = set()
    for words in words_of(20):
        box = random_crop_box(*photo.size, words)
        expected = photo.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        flip = int(words[2 * ATTEMPTS + 2]) >= 2**31
        seen.add(flip)
        pixels = np.asarray(expected)[:, ::-1] if flip else np.asarray(expected)
        np.testing.assert_array_equal(np.asarray(train_transform(photo, 32, words, jitter=False)), pixels)
    assert seen == {True, False}


def test_jitter_scales_brightness_contrast_and_saturation_within_its_range(photo):
    """A uniform grey image shows the brightness factor alone: contrast and saturation leave it as it is."""
    grey = Image.new("RGB", (40, 40), (120, 120, 120))
    values = [np.asarray(train_transform(grey, 8, words, jitter=True)) for words in words_of(400)]
    assert all((value == value[0, 0, 0]).all() for value in values)
    factors = np.array([value[0, 0, 0] / 120 for value in values])
    assert factors.min() == pytest.approx(0.6, abs=0.02)
    assert factors.max() == pytest.approx(1.4, abs=0.02)
    assert factors.mean() == pytest.approx(1.0, abs=0.04)


def test_jitter_order_and_factors_are_the_words(photo):
    from PIL import ImageEnhance

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for words in words_of(30, seed=4):
        expected = train_transform(photo, 16, words, jitter=False)
        order = orders[int(words[2 * ATTEMPTS + 3]) * 6 >> 32]
        for k in order:
            factor = 0.6 + 0.8 * int(words[2 * ATTEMPTS + 4 + k]) / 2**32
            expected = enhancers[k](expected).enhance(factor)
        np.testing.assert_array_equal(np.asarray(train_transform(photo, 16, words, jitter=True)), np.asarray(expected))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (100, 90), (1000, 30), (1, 1)])
def test_evaluation_resizes_the_short_side_to_256_and_crops_the_centre(size):
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).copy())
    result = evaluation_transform(image, 224)
    assert result.size == (224, 224)
    scale = 256 / min(size)
    shown = 224 / (scale * size[0])  # share of the width that is left
    pixels = np.asarray(result)[112, :, 0].astype(float)
    if size[0] > 1:
        assert pixels[0] == pytest.approx(255 * (0.5 - shown / 2), abs=3)
        assert pixels[-1] == pytest.approx(255 * (0.5 + shown / 2), abs=3)


def test_evaluation_at_another_size():
    assert evaluation_transform(Image.new("RGB", (50, 40)), 32).size == (32, 32)
