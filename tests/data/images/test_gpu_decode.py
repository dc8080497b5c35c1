"""Windows of images of many sizes, resized together."""

import builtins
import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from shike_fast.data import load_dataset
from shike_fast.data.images.gpu_decode import (
    NoHardwareDecoderError,
    Resizing,
    hardware_decoder,
    resize_windows,
    without_exif,
)
from shike_fast.data.images.transforms import evaluation_box, evaluation_size, resize
from shike_fast.data.loaders.gpu import GpuPhotoLoader
from shike_fast.data.loaders.photo import PhotoLoader


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*rng.integers(1, 200, 2), 3), np.uint8) for _ in range(70)]  # more than one group


def tensors(images):
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def test_windows_are_resized_like_each_alone(images):
    rng = np.random.default_rng(1)
    plans, expected = [], []
    for image in images:
        height, width = image.shape[:2]
        left, top = (int(rng.integers(0, side)) for side in (width, height))
        right, bottom = int(rng.integers(left + 1, width + 1)), int(rng.integers(top + 1, height + 1))
        plans.append(Resizing((left, top, right, bottom), 48, 48))
        window = Image.fromarray(image[top:bottom, left:right])
        expected.append(np.asarray(window.resize((48, 48), Image.Resampling.BILINEAR)).transpose(2, 0, 1))
    found = resize_windows(tensors(images), plans, 48)
    assert found.dtype == torch.uint8 and found.shape == (70, 3, 48, 48)
    assert np.abs(found.numpy().astype(int) - np.stack(expected)).max() <= 1


def test_a_part_of_a_resized_image(images):
    plans, expected = [], []
    for image in images:
        left, top, right, bottom = evaluation_box(*image.shape[1::-1])
        width, height = evaluation_size(right - left, bottom - top, 28)
        x, y = (width - 28) // 2, (height - 28) // 2
        plans.append(Resizing((left, top, right, bottom), width, height, x, y))
        expected.append(resize(image[top:bottom, left:right], width, height)[:, y : y + 28, x : x + 28])
    found = resize_windows(tensors(images), plans, 28)
    assert np.abs(found.numpy().astype(int) - np.stack(expected)).max() <= 1


def test_nothing_to_resize():
    assert resize_windows([], [], 8).shape == (0, 3, 8, 8)


CUDA = torch.device("cuda")


@pytest.fixture
def waits(monkeypatch):
    """A machine with a GPU, of which this says who is waited for, and no decoder."""
    waits: list[str] = []

    class Stream:
        synchronize = staticmethod(lambda: waits.append("stream"))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("device"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("torchcodec", "torchcodec.decoders", "torchvision", "torchvision.io"):
        monkeypatch.setitem(sys.modules, name, None)
    return waits


def install(monkeypatch, name, **contents):
    """Let ``name`` be a module with these contents."""
    package, _, _ = name.partition(".")
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)


def jpeg(orientation=1, side=16):
    """A JPEG whose left half is white and whose right half is black as it is stored."""
    image = Image.new("RGB", (2 * side, side))
    image.paste((255, 255, 255), (0, 0, side, side))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def decoded(encoded, *, turns):
    """As a decoder does it that turns pictures upright by Exif, or one that does not."""
    image = Image.open(io.BytesIO(encoded.numpy().tobytes()))
    image = ImageOps.exif_transpose(image) if turns else image
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def install_torchcodec(monkeypatch, *, works=True):
    """The interface of torchcodec 0.16: the mode is a text, and pictures are turned upright."""

    def decode_jpeg(source, *, mode="RGB", output_dtype=torch.uint8, device="cpu"):
        assert isinstance(source, list) and mode == "RGB" and output_dtype == torch.uint8 and device == CUDA
        if not works:
            raise RuntimeError("torchcodec was not compiled with nvJPEG support")
        return [decoded(encoded, turns=True) for encoded in source]

    install(monkeypatch, "torchcodec.decoders", decode_jpeg=decode_jpeg)


def install_torchvision(monkeypatch, *, works=True):
    """The interface of torchvision.io: the mode is an enumeration, and pictures stay as they are stored."""

    class ImageReadMode:
        RGB = "an RGB of its own"

    def decode_jpeg(input, mode="UNCHANGED", device="cpu", apply_exif_orientation=False):
        assert isinstance(input, list) and mode == ImageReadMode.RGB and device == CUDA
        if not works:
            raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")
        return [decoded(encoded, turns=apply_exif_orientation) for encoded in input]

    install(monkeypatch, "torchvision.io", ImageReadMode=ImageReadMode, decode_jpeg=decode_jpeg)


INSTALL = {"torchcodec": install_torchcodec, "torchvision": install_torchvision}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", INSTALL)
def test_pictures_come_as_they_are_stored(monkeypatch, waits, name, orientation):
    """Whoever plans the windows has asked for the orientation, and turns what is to be turned."""
    INSTALL[name](monkeypatch)
    (picture,) = hardware_decoder(CUDA)((jpeg(orientation),))
    assert torch.equal(picture, decoded(jpeg(orientation), turns=False))
    assert waits == ["stream"] * 2  # the decoder does not wait by itself, neither for the trial nor for the batch


@pytest.mark.parametrize("name", INSTALL)
def test_rotated_images_are_turned_once(monkeypatch, waits, image_dir, name):
    INSTALL[name](monkeypatch)
    decode = hardware_decoder(CUDA)
    for number, path in enumerate(sorted((image_dir / "train" / "cat").iterdir())):
        path.with_suffix(".jpg").write_bytes(jpeg(1 + number % 8, side=64).numpy().tobytes())
    train = load_dataset("imagefolder", data_dir=image_dir, image_size=32, augmentation="none").train
    loaders = (
        PhotoLoader(train, batch_size=20, shuffle=False, device="cpu", num_workers=0),
        GpuPhotoLoader(train, batch_size=20, shuffle=False, device="cpu", decode=decode),
    )
    (expected, _), (found, _) = (next(iter(loader.epoch(0))) for loader in loaders)
    assert (found - expected).abs().max() <= 3.01 / 255 / 0.224  # the filters round differently


def test_torchcodec_goes_before_torchvision(monkeypatch, waits):
    install_torchvision(monkeypatch, works=False)
    install_torchcodec(monkeypatch)
    assert len(hardware_decoder(CUDA)([jpeg()])) == 1
    assert waits == ["stream"] * 2


@pytest.mark.parametrize("state", ["too old", "without CUDA"])
def test_where_torchcodec_cannot_torchvision_does_it(monkeypatch, waits, state):
    install_torchvision(monkeypatch)
    if state == "too old":
        install(monkeypatch, "torchcodec.decoders", VideoDecoder=None)
    else:
        install_torchcodec(monkeypatch, works=False)
    assert len(hardware_decoder(CUDA)([jpeg(), jpeg()])) == 2


def test_neither_is_there(waits):
    with pytest.raises(NoHardwareDecoderError, match=r"neither torchcodec nor torchvision .*; install the one of this"):
        hardware_decoder(CUDA)


def test_packages_that_do_not_fit(monkeypatch, waits):
    """Of another PyTorch, or built without nvJPEG: what they say is told."""
    imported = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("torchcodec"):
            raise RuntimeError("Could not load libtorchcodec.\nLikely causes: ...")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    install_torchvision(monkeypatch, works=False)
    with pytest.raises(
        NoHardwareDecoderError, match=r"\(torchcodec: Could not .* \.\.\.; torchvision: .*nvJPEG"
    ) as found:
        hardware_decoder(CUDA)
    assert "\n" not in str(found.value)
    assert waits == ["stream", "device"]


def test_what_a_camera_noted_is_left_out_and_nothing_else():
    plain, noted = jpeg(), jpeg(6)
    without = without_exif(noted)
    assert len(without) < len(noted) and b"Exif" not in without.numpy().tobytes()
    assert torch.equal(decoded(without, turns=True), decoded(noted, turns=False))
    assert without_exif(without) is without
    assert torch.equal(without_exif(plain), without)
    for length in (0, 1, 3, 5, 30):  # cut off, of which the decoder says what it thinks
        assert len(without_exif(noted[:length])) <= length


def test_another_makers_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(NoHardwareDecoderError, match="built without CUDA"):
        hardware_decoder(torch.device("cuda"))
