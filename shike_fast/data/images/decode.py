"""Image files to pixels: JPEG by libjpeg-turbo, at a reduced size where that is enough, everything else by Pillow.

What becomes of odd files, whichever data set they belong to:

- grey, palette, CMYK and transparent images become RGB as Pillow converts them (transparency is dropped);
- 16-bit images keep their high byte;
- an orientation noted by a camera (Exif) is applied, so that pictures are upright;
- the content decides what a file is, not its name;
- the formats are :data:`FORMATS`;
- a truncated file, one that its decoder cannot go on with, and one of more than :data:`MOST_PIXELS` is a
  :class:`BrokenImageError`. (In a JPEG, damage that leaves the end in place may only show as wrong pixels.)
"""

import io
import warnings
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (  # each adds its format to those that Image.open knows
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from shike_fast._util.resources import is_lacking, lacking
from shike_fast.errors import DataError

# A file of a few kilobytes may claim to hold any number of pixels. Pillow refuses from here on as well.
MOST_PIXELS = 178_956_970
# Not everything that Pillow knows: some formats start other programs, others hardly anybody has ever tested.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
REDUCTIONS = (8, 4, 2)  # what libjpeg-turbo's inverse DCT can do as fast as the whole

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # of Exif
_EXIF_WITHIN = 2**16  # bytes: the segment stands at the very beginning
_END, _END_WITHIN = b"\xff\xd9", 64  # the marker at the end of a JPEG, and the bytes in which it must be
_ROTATED = (5, 6, 7, 8)  # orientations that exchange width and height

Pixels = NDArray[np.uint8]  # [H, W, 3]
Encoded = bytes | memoryview


class BrokenImageError(DataError):
    """An image cannot be decoded. The text says why, without the image's name, which only its reader knows."""


def unreadable(error: OSError, what: str = "") -> Exception:
    """What to raise for an image that the system did not let us read: it is broken, unless something else is lacking.

    Args:
        error: the failure.
        what: the file, if that is not the image itself.
    """
    if is_lacking(error):
        return lacking("cannot read images", error)
    return BrokenImageError(f"{what + ' ' if what else ''}cannot be read ({error.strerror or error})")


class Picture(Protocol):
    """An image that is about to be decoded.

    Attributes:
        width, height: in pixels, upright.
        plain_jpeg: a JPEG of grey or ordinary colours that is stored upright and has an end: any decoder gives its
            pixels.
    """

    width: int
    height: int
    plain_jpeg: bool

    def pixels(self, reduction: int = 1) -> Pixels:
        """Decode: uint8 [⌈height / r⌉, ⌈width / r⌉, 3] for an r of 1 or ``reduction`` (or between).

        Args:
            reduction: 1, 2, 4 or 8: how much smaller than the image the caller can do with.

        Raises:
            BrokenImageError: the image is truncated or damaged.
        """
        ...


class RawPicture:
    """Pixels that need no decoding, perhaps of a memory map: only those that are looked at are read."""

    plain_jpeg = False

    def __init__(self, pixels: Pixels) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def pixels(self, reduction: int = 1) -> Pixels:
        return self._pixels


class _Jpeg:
    def __init__(self, data: Encoded, width: int, height: int, orientation: int, *, plain: bool) -> None:
        self._data = data
        self._orientation = orientation
        self.plain_jpeg = plain
        rotated = self._orientation in _ROTATED
        self.width, self.height = (height, width) if rotated else (width, height)

    def pixels(self, reduction: int = 1) -> Pixels:
        least = (-(-self.height // reduction), -(-self.width // reduction))
        if self._orientation in _ROTATED:
            least = least[::-1]
        try:
            decoded = simplejpeg.decode_jpeg(
                self._data, min_height=least[0], min_width=least[1], min_factor=reduction if reduction > 1 else 1
            )
        except ValueError:
            # Strict about what many encoders get slightly wrong. Pillow tells truncated files from those.
            return _with_pillow(self._data).pixels(reduction)
        return _upright(decoded, self._orientation)


class _Pillow:
    plain_jpeg = False

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._size = image.size
        # Not getexif(), which for some formats loads the image; that may fail silently, and no second time. A TIFF
        # Pillow turns upright by itself.
        self._orientation = 1 if image.format == "TIFF" else _orientation_in(image.info.get("exif", b""))
        rotated = self._orientation in _ROTATED
        self.width, self.height = image.size[::-1] if rotated else image.size

    def pixels(self, reduction: int = 1) -> Pixels:
        with _decoding():
            image = self._image
            image.load()
            if image.size != self._size:
                raise BrokenImageError(f"has {image.width} x {image.height} pixels, not what its beginning says")
            if reduction > 1 and image.mode in ("RGB", "L"):
                image = image.reduce(reduction)
            pixels = np.asarray(rgb(image))
        return _upright(pixels, self._orientation)


def open_image(data: Encoded) -> Picture:
    """Read what an encoded image says of itself.

    Args:
        data: the content of an image file.

    Raises:
        BrokenImageError: it is empty, no image, damaged already here, or too large.
    """
    if not data:
        raise BrokenImageError("is empty")
    if bytes(data[:3]) == _JPEG:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return _with_pillow(data)
        _check_size(width, height)
        if colours in ("Gray", "YCbCr", "RGB"):
            orientation = _orientation(data)
            plain = colours != "RGB" and orientation == 1 and _END in bytes(data[-_END_WITHIN:])
            return _Jpeg(data, width, height, orientation, plain=plain)
    return _with_pillow(data)


def plain_jpeg(data: Encoded, width: int, height: int) -> Picture:
    """:func:`open_image` of a JPEG that is known to be plain and of this size: nothing has to be read of it yet."""
    return _Jpeg(data, width, height, orientation=1, plain=True)


def picture_of(image: Image.Image) -> Picture:
    """An image that Pillow has opened, or made."""
    _check_size(*image.size)
    return _Pillow(image)


def _with_pillow(data: Encoded) -> Picture:
    with _decoding():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size)
        return _Pillow(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BrokenImageError(
            f"has {width} x {height} pixels, more than {MOST_PIXELS // 10**6} million, which may be a trap for memory"
        )


class _decoding:
    """Turn whatever Pillow's decoders raise into a BrokenImageError; keep its warnings to ourselves."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if not isinstance(error, Exception) or isinstance(error, (MemoryError, DataError)):
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image, or of a format that is not read here"  # its text shows the address of a buffer
        raise BrokenImageError(f"cannot be decoded as an image ({reason})") from error


def rgb(image: Image.Image) -> Image.Image:
    """The image in red, green and blue, of 16 bits the high ones."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _orientation(data: Encoded) -> int:
    """The Exif orientation of a JPEG, 1 where it says nothing."""
    start = bytes(data[:_EXIF_WITHIN])
    return _orientation_in(start[start.index(_EXIF) :]) if _EXIF in start else 1


def _orientation_in(encoded: bytes) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif = Image.Exif()
            exif.load(encoded)
            return int(exif.get(_ORIENTATION, 1))
        except Exception:  # damaged Exif data, of which Pillow's parser raises many types, is no damaged image
            return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an Exif orientation."""
    if orientation in _ROTATED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
