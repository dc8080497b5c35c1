"""Decoding JPEG photographs of 500 x 375, quality 90, to RGB: Pillow, simplejpeg and kornia-rs, in one thread.

A call decodes 64 images in memory, one after the other, whole or at a reduced size, which both Pillow (``draft``) and
simplejpeg leave to libjpeg-turbo's inverse transform and kornia-rs does not have. simplejpeg is timed as the loaders
use it, with reading the header and looking for a camera's orientation. kornia-rs takes part where it is installed.
"""

import io
from collections.abc import Callable

import numpy as np
import pytest
from photographs import photographs
from PIL import Image

from shike_fast.data.images.decode import open_image

IMAGES = 64
CASES: dict[str, tuple[str, ...]] = {"cpu": ("whole", "1/2", "1/4", "1/8"), "cuda": ()}

Decode = Callable[[bytes], np.ndarray]


def with_pillow(reduction: int, data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // reduction, image.height // reduction))
    return np.asarray(image.convert("RGB"))


def kornia_rs() -> dict[str, Decode]:
    try:
        from kornia_rs.io import decode_image_jpegturbo
    except ImportError:
        return {}
    return {"kornia-rs": lambda data: decode_image_jpegturbo(data, "rgb")}


@pytest.mark.op("JPEG decoding")
def test_decode(case, device, side_by_side):
    files = []
    for image in photographs(IMAGES, 500, 375):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    reduction = 1 if case == "whole" else int(case.removeprefix("1/"))
    decoders: dict[str, Decode] = {
        "Pillow": lambda data: with_pillow(reduction, data),
        "simplejpeg": lambda data: open_image(data).pixels(reduction),
        **(kornia_rs() if reduction == 1 else {}),
    }

    def run(decode: Decode) -> None:
        for data in files:
            decode(data)

    calls = {name: lambda decode=decode: run(decode) for name, decode in decoders.items()}
    side_by_side(calls, images=IMAGES, calls=1, rounds=15, facts={name: {} for name in calls})
