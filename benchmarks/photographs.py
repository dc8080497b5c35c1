"""Photographs for the benchmarks: windows of the two that scikit-learn brings."""

import random
from collections.abc import Iterator

from PIL import Image
from sklearn.datasets import load_sample_images


def photographs(count: int, width: int, height: int) -> Iterator[Image.Image]:
    """The same ``count`` images of ``width`` x ``height`` in every call, no two of them alike."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    draw = random.Random(0)
    for number in range(count):
        source = sources[number % len(sources)]
        window_width = draw.uniform(0.5, 1.0) * min(source.width, source.height * width / height)
        window_height = window_width * height / width
        left, top = draw.uniform(0, source.width - window_width), draw.uniform(0, source.height - window_height)
        box = (left, top, left + window_width, top + window_height)
        yield source.resize((width, height), Image.Resampling.BICUBIC, box)
