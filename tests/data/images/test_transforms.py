import math

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast.data.augment.crop import ATTEMPTS, CROP_WORDS, random_crop_box
from shike_fast.data.images.decode import RawPicture
from shike_fast.data.images.transforms import evaluation_pixels, resize, training_pixels
from shike_fast.data.random import STREAM_AUGMENTATION, draw_words

FULL = 2**32 - 1


def words_of(count, seed=0):
    return draw_words(seed, 0, np.arange(count), CROP_WORDS, STREAM_AUGMENTATION)


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
    words = np.zeros(CROP_WORDS, np.uint32)
    words[0] = 2**31  # area 0.54
    words[ATTEMPTS] = 2**31  # ratio 1
    words[2 * ATTEMPTS] = FULL  # top: as low as possible
    side = round(math.sqrt(0.54 * 100 * 100))
    assert random_crop_box(100, 100, words) == (0, 100 - side, side, 100)


def test_a_later_attempt_is_used_when_the_first_does_not_fit():
    words = np.zeros(CROP_WORDS, np.uint32)
    words[0] = FULL  # the whole area at ratio 3/4 does not fit a square
    words[1], words[ATTEMPTS + 1] = 2**30, 2**31  # area 0.31, ratio 1
    side = round(math.sqrt((0.08 + 0.92 / 4) * 100 * 100))
    assert random_crop_box(100, 100, words) == (0, 0, side, side)


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520)), ((40, 36), (0, 0, 40, 36))]
)
def test_the_centre_is_used_when_nothing_fits(size, box):
    words = np.zeros(CROP_WORDS, np.uint32)
    words[:ATTEMPTS] = FULL  # ten times the whole area at ratio 3/4
    assert random_crop_box(*size, words) == box


def test_a_one_pixel_image_has_a_crop():
    for words in words_of(20):
        assert random_crop_box(1, 1, words) == (0, 0, 1, 1)


def square(side, layout=torch.contiguous_format):
    return torch.empty(1, 3, side, side, dtype=torch.uint8, memory_format=layout)[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_window_is_resized_like_pillow_does(photo, layout):
    for words in words_of(20):
        box = random_crop_box(*photo.size, words)
        expected = np.asarray(photo.crop(box).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        result = square(32, layout)
        training_pixels(RawPicture(np.asarray(photo)), box, result)
        assert np.abs(result.numpy().astype(int) - expected).max() <= 1


def test_a_window_of_the_wanted_size_is_copied(photo):
    pixels = np.asarray(photo)
    result = square(48)
    training_pixels(RawPicture(pixels), (10, 20, 58, 68), result)
    np.testing.assert_array_equal(result.numpy(), pixels[20:68, 10:58].transpose(2, 0, 1))


def test_resize_reads_what_may_not_be_written(photo):
    pixels = np.array(photo)
    expected = resize(pixels, 30, 20)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(resize(pixels, 30, 20), expected)
    assert expected.shape == (3, 20, 30)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (100, 90), (1000, 30), (1, 1)])
def test_evaluation_resizes_the_short_side_to_256_and_crops_the_centre(size):
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).copy())
    result = square(224)
    evaluation_pixels(RawPicture(np.asarray(image)), result)
    scale = 256 / min(size)
    shown = 224 / (scale * size[0])  # share of the width that is left
    pixels = result[0, 112].double()
    if size[0] > 1:
        assert pixels[0] == pytest.approx(255 * (0.5 - shown / 2), abs=3)
        assert pixels[-1] == pytest.approx(255 * (0.5 + shown / 2), abs=3)


def test_evaluation_at_another_margin(photo):
    result = square(32)
    evaluation_pixels(RawPicture(np.asarray(photo)), result, margin=1.0)
    resized = np.asarray(photo.resize((42, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(result.numpy().astype(int) - resized[:, :, 5:37]).max() <= 1


def test_a_large_image_has_the_same_size_before_the_crop_as_a_small_one():
    """Computed from the whole image, not from what is left of it after decoding at a reduced size."""

    class Reduced(RawPicture):
        def pixels(self, reduction=1):
            return super().pixels()[::reduction, ::reduction].copy()

    ramp = np.broadcast_to(np.linspace(0, 255, 1601)[None, :, None], (1030, 1601, 3)).astype(np.uint8)
    whole, reduced = square(224), square(224)
    evaluation_pixels(RawPicture(ramp), whole)
    evaluation_pixels(Reduced(ramp), reduced)
    assert (whole.int() - reduced.int()).abs().max() <= 1
