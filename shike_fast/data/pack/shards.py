"""The archives of a pack, and the images in them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import IO

import numpy as np
import simplejpeg
from PIL import Image

from shike_fast.data.images.decode import REDUCTIONS, BrokenImageError, open_image
from shike_fast.data.images.stores import ImageStore
from shike_fast.data.images.transforms import resize
from shike_fast.data.pack.format import FileRecord, Settings

_EXIF_ORIENTATION = 0x0112


class ShardWriter:
    """Writes a tar archive whose bytes depend on its members alone.

    Args:
        file: an empty file, open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._written = 0

    def add(self, name: str, content: bytes) -> int:
        """Append a member; returns where its content begins."""
        member = tarfile.TarInfo(name)  # owner, time: 0
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self._written
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def close(self, name: str) -> FileRecord:
        """Write the end of the archive; returns what the file called ``name`` is."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._written % tarfile.RECORDSIZE))
        return FileRecord(name, self._written, self._digest.hexdigest())

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._written += len(content)


def encode_image(store: ImageStore, index: int, settings: Settings) -> tuple[bytes, int, int]:
    """An image as the pack holds it: its bytes, width and height.

    Raises:
        BrokenImageError: it cannot be read, or is too long for a JPEG.
    """
    data = store.read(index)
    picture = store.open(index) if data is None else open_image(data)
    side, short = settings.short_side, min(picture.width, picture.height)
    # Decoded even where the file is copied: it might be broken.
    pixels = picture.pixels(next((r for r in REDUCTIONS if short >= r * 2 * side), 1))
    width, height = picture.width, picture.height
    if short > side:
        scale = side / short
        width, height = max(side, int(width * scale)), max(side, int(height * scale))
        pixels = resize(pixels, width, height).transpose(1, 2, 0)
    elif data is not None and settings.format == "jpeg" and _plain_jpeg(bytes(data)):
        return bytes(data), width, height
    pixels = np.ascontiguousarray(pixels)
    if settings.quality is None:
        return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes(), width, height
    try:
        return simplejpeg.encode_jpeg(pixels, settings.quality, colorsubsampling="420"), width, height
    except ValueError as error:
        raise BrokenImageError(f"has {width} x {height} pixels, which no JPEG can hold ({error})") from error


def _plain_jpeg(data: bytes) -> bool:
    """Whether a file can be kept as it is: a grey or colour JPEG that is upright without a note saying so."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.mode in ("L", "RGB") and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    except Exception:  # Pillow's parsers raise many types; what they do not understand is encoded anew
        return False
