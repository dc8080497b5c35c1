"""What becomes of a description in a picture, on a page and as JSON, whatever the classes are."""

import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from described import of_sizes
from pages import Page
from PIL import Image

from shike_fast.data.commands import description_files


def pixels(description):
    with Image.open(io.BytesIO(description_files.as_picture(description, "png"))) as image:
        return {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}


BLUE, ORANGE, RED, BLACK = (31, 119, 180), (255, 127, 14), (214, 39, 40), (0, 0, 0)


@pytest.mark.parametrize("classes", [10, 100, 8142])
def test_the_picture_shows_every_shot(classes):
    sizes = np.maximum(2, 300 * 0.01 ** (np.arange(classes) / (classes - 1))).astype(int)
    colours = pixels(of_sizes(sizes.tolist()))
    assert {BLUE, ORANGE, RED, BLACK} <= colours


def test_a_picture_of_classes_of_one_size_and_without_a_test():
    colours = pixels(of_sizes([500] * 10, [0] * 10))
    assert BLUE in colours and not {ORANGE, RED} & colours
    assert RED in pixels(of_sizes([7]))


@pytest.mark.parametrize("name", ["$x^{$", "\udcff.jpg", "狗", "x" * 300, "a\nb"])
def test_any_folder_name_can_be_a_class(name):
    description = of_sizes([5, 3, 2], names=[name, "b", "c"])
    assert len(description_files.as_picture(description, "png")) > 1000
    Page(description_files.as_page(description).encode().decode())
    assert len(json.loads(description_files.as_json(description))["class_sizes"]) == 3


def labels_of(description):
    """The texts of the thresholds in a picture."""
    words = "".join(ElementTree.fromstring(description_files.as_picture(description, "svg")).itertext())
    return re.findall(r"(?:suggested: )?(?:many above|few below) \d+(?:, few below \d+)?", words)


def test_the_picture_names_the_thresholds():
    assert labels_of(of_sizes([300, 50, 5])) == ["many above 100", "few below 20"]
    assert labels_of(of_sizes([18, 10, 8, 6, 4, 3])) == ["suggested: many above 8", "suggested: few below 6"]
    assert labels_of(of_sizes([18, 10, 8])) == ["suggested: many above 10, few below 10"]
    assert labels_of(of_sizes([500] * 10, [300] * 10)) == []  # beyond the axis
