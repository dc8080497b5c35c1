"""What becomes of ordinary, odd and broken image files."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from shike_fast.data.images.decode import MOST_PIXELS, BrokenImageError, RawPicture, open_image


def encode(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width=120, height=80):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)).resize((width, height))


def png_header(width, height):
    """A PNG that claims to be of some size, with nothing behind."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_format_gives_pillows_pixels(kind):
    content = encode(photo(), kind)
    picture = open_image(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (picture.width, picture.height) == (120, 80)
    np.testing.assert_array_equal(picture.pixels(), expected)
    assert picture.plain_jpeg == (kind == "JPEG")


def test_a_memory_view_is_as_good():
    content = encode(photo())
    np.testing.assert_array_equal(open_image(memoryview(content)).pixels(), open_image(content).pixels())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_sizes_look_the_same(kind, reduction):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)).resize((241, 163))
    found = open_image(encode(smooth, kind, **({"quality": 95} if kind == "JPEG" else {}))).pixels(reduction)
    assert found.shape == (-(-163 // reduction), -(-241 // reduction), 3)
    expected = np.asarray(smooth.reduce(reduction)).astype(int)
    assert np.abs(found - expected).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photo(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    picture = open_image(content)
    assert (picture.height, picture.width) == expected.shape[:2]
    np.testing.assert_array_equal(picture.pixels(), expected)
    assert picture.pixels(2).shape == (expected.shape[0] // 2, expected.shape[1] // 2, 3)
    assert picture.plain_jpeg == (kind == "JPEG" and orientation == 1)


def test_damaged_exif_data_is_no_damaged_image():
    content = encode(photo(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert open_image(content).pixels().shape == (80, 120, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpeg_become_rgb(mode):
    content = encode(photo().convert(mode))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    picture = open_image(content)
    np.testing.assert_array_equal(picture.pixels(), expected)
    assert picture.plain_jpeg == (mode == "L")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_colour_modes_become_rgb(mode):
    image = photo().convert(mode)
    np.testing.assert_array_equal(open_image(encode(image, "PNG")).pixels(), np.asarray(image.convert("RGB")))


def test_16_bit_grey_keeps_its_high_byte():
    values = np.arange(120 * 80, dtype=np.uint16).reshape(80, 120) * 6
    found = open_image(encode(Image.fromarray(values), "PNG")).pixels()
    np.testing.assert_array_equal(found, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_a_16_bit_ppm_keeps_its_high_byte():
    found = open_image(b"P5 2 1 65535\n\x80\x00\x12\x34").pixels()
    assert found.tolist() == [[[0x80] * 3, [0x12] * 3]]


def test_formats_that_start_other_programs_are_not_opened():
    with pytest.raises(BrokenImageError, match="of a format that is not read here"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def test_a_jpeg_without_an_end_is_not_for_every_decoder():
    content = encode(photo())
    assert open_image(content).plain_jpeg and not open_image(content[:-2]).plain_jpeg


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "really_a.jpg"
    path.write_bytes(encode(photo(), "PNG"))
    np.testing.assert_array_equal(open_image(path.read_bytes()).pixels(), np.asarray(photo()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_broken(kind, share):
    content = encode(photo(400, 300), kind)
    with pytest.raises(BrokenImageError, match="cannot be decoded as an image"):
        open_image(content[: int(share * len(content))]).pixels()


def test_the_very_end_of_a_jpeg_is_missed():
    with pytest.raises(BrokenImageError, match="truncated"):
        open_image(encode(photo(400, 300))[:-40]).pixels()


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\xff\xd8", b"\xff\xd8\xff\xe0" + bytes(60), bytes(100)])
def test_what_is_no_image_is_broken(content):
    with pytest.raises(BrokenImageError, match="cannot be decoded as an image"):
        open_image(content).pixels()


def test_a_png_with_damaged_data_is_broken():
    content = bytearray(encode(photo(), "PNG"))
    data = content.index(b"IDAT") + 4
    content[data : data + 20] = b"\xff" * 20
    with pytest.raises(BrokenImageError, match="broken data stream"):
        open_image(bytes(content)).pixels()


def test_an_empty_file_is_broken():
    with pytest.raises(BrokenImageError, match="is empty"):
        open_image(b"")


def test_a_jpeg_with_bytes_behind_its_end_is_fine():
    content = encode(photo())
    np.testing.assert_array_equal(open_image(content + b"trailing" * 9).pixels(), open_image(content).pixels())


def test_a_jpeg_that_the_strict_decoder_refuses_is_pillows(monkeypatch):
    content = encode(photo())
    marker = content.index(b"\xff\xdb")
    spoiled = content[:marker] + b"\x00\x00" + content[marker:]  # stray bytes between segments
    expected = np.asarray(Image.open(io.BytesIO(spoiled)).convert("RGB"))
    np.testing.assert_array_equal(open_image(spoiled).pixels(), expected)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (MOST_PIXELS + 1, 1)])
def test_a_decompression_bomb_is_refused_before_it_goes_off(width, height):
    tracemalloc.start()
    with pytest.raises(BrokenImageError):
        open_image(png_header(width, height)).pixels()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_jpeg_bomb_is_refused():
    content = bytearray(encode(photo()))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BrokenImageError, match="more than 178 million"):
        open_image(bytes(content))


def test_60_megapixels_are_decoded_at_the_size_that_is_needed():
    content = encode(Image.new("RGB", (10_000, 6_000), (10, 200, 30)))
    tracemalloc.start()  # NumPy reports its arrays; the decoder itself works row by row
    pixels = open_image(content).pixels(8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.shape == (750, 1250, 3)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (10, 200, 30)).max() < 2
    assert peak < 20e6


def test_raw_pixels_are_not_copied():
    pixels = np.zeros((4, 6, 3), np.uint8)
    picture = RawPicture(pixels)
    assert (picture.width, picture.height, picture.plain_jpeg) == (6, 4, False)
    assert picture.pixels(2) is pixels


def test_running_out_of_memory_is_not_blamed_on_the_file(monkeypatch):
    def fail(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        open_image(encode(photo(), "PNG"))
