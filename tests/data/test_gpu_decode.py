"""Windows of images of many sizes, resized together."""

import builtins
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast.data.gpu_decode import NoHardwareDecoderError, Resizing, hardware_decoder, resize_windows
from shike_fast.data.image_transforms import evaluation_box, evaluation_size, resize


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


def test_no_torchvision(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(NoHardwareDecoderError, match=r"cannot be imported .*nms.* of this PyTorch"):
        hardware_decoder(torch.device("cuda"))


@pytest.mark.parametrize("works", [True, False])
def test_a_torchvision_with_and_without_a_decoder(monkeypatch, works):
    class Io:
        class ImageReadMode:
            RGB = "RGB"

        @staticmethod
        def decode_jpeg(encoded, *, mode, device):
            if not works:
                raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")
            assert (mode, device.type) == ("RGB", "cuda") and isinstance(encoded, list)
            return [torch.zeros(3, 16, 16, dtype=torch.uint8) for _ in encoded]

    class Stream:
        synchronize = staticmethod(lambda: waits.append("stream"))

    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("device"))
    monkeypatch.setitem(sys.modules, "torchvision", Io)
    monkeypatch.setitem(sys.modules, "torchvision.io", Io)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if works:
        assert len(hardware_decoder(torch.device("cuda"))((torch.zeros(3), torch.zeros(4)))) == 2
        assert waits == ["stream"] * 2  # the decoder does not wait by itself, neither for the trial nor for the batch
    else:
        with pytest.raises(NoHardwareDecoderError, match=r"does not decode JPEG on cuda .*nvJPEG"):
            hardware_decoder(torch.device("cuda"))
        assert waits == ["stream", "device"]


def test_another_makers_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(NoHardwareDecoderError, match="built without CUDA"):
        hardware_decoder(torch.device("cuda"))
