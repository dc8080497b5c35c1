"""JPEG decoding by the GPU's own decoder, and windows of images of many sizes resized together on a device."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Encoded images, uint8 [bytes] on the CPU, to uint8 [3, H, W] on the GPU. RuntimeError if one cannot be decoded.
DecodeBatch = Callable[[Sequence[Tensor]], list[Tensor]]

_AT_A_TIME = 64  # images resized together: bounds the memory of the index arrays, 0.15 GB for windows of 500 x 500
_APP1, _SCAN, _FILL = 0xE1, 0xDA, 0xFF  # second bytes of markers in a JPEG


class NoHardwareDecoderError(RuntimeError):
    """The GPU, or what is installed, cannot decode JPEG there; says why."""


def hardware_decoder(device: torch.device) -> DecodeBatch:
    """torchcodec's decoder or, where that is not installed, torchvision's: both hand whole batches to NVIDIA's nvJPEG.

    The images come as they are stored, whatever orientation a camera has noted.

    Raises:
        NoHardwareDecoderError: the device is no NVIDIA GPU, or neither package is there, works, and can do that.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        raise NoHardwareDecoderError(
            f"{device} is no NVIDIA GPU" if device.type != "cuda" else "this PyTorch was built without CUDA"
        )
    reasons = []
    for name, find in (("torchcodec", _torchcodec), ("torchvision", _torchvision)):
        try:
            return _tried(find(), device)
        except Exception as error:  # whatever the extension of a package of another PyTorch raises, or one without CUDA
            reasons.append(f"{name}: {' '.join(str(error).split())}")
    raise NoHardwareDecoderError(
        f"neither torchcodec nor torchvision decodes JPEG on {device} ({'; '.join(reasons)}); install the one of this "
        "PyTorch"
    )


_Decode = Callable[[list[Tensor], torch.device], list[Tensor]]


def _torchcodec() -> _Decode:
    from torchcodec.decoders import decode_jpeg  # since version 0.16

    # It turns images upright by itself, always.
    return lambda encoded, device: decode_jpeg([without_exif(jpeg) for jpeg in encoded], mode="RGB", device=device)


def _torchvision() -> _Decode:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda encoded, device: decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def _tried(decode_jpeg: _Decode, device: torch.device) -> DecodeBatch:
    """The decoder, in step with the present stream, and after it has shown that it works."""

    def decode(encoded: Sequence[Tensor]) -> list[Tensor]:
        # nvJPEG writes, out of step with this stream, to memory that was taken from it: kernels that still read what
        # lay there before must be done.
        torch.cuda.current_stream(device).synchronize()
        try:
            return decode_jpeg(list(encoded), device)
        except RuntimeError:
            torch.cuda.synchronize(device)  # nor may it still be writing when that memory is used again
            raise

    trial = io.BytesIO()
    Image.new("RGB", (16, 16)).save(trial, "JPEG")
    decode([torch.frombuffer(bytearray(trial.getvalue()), dtype=torch.uint8)])
    return decode


def without_exif(encoded: Tensor) -> Tensor:
    """A JPEG without what a camera has noted, uint8 [bytes] as before: the same pixels, and no orientation."""
    data = encoded.numpy()
    kept, start, at = [], 0, 2  # behind the marker that begins the file
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (_FILL, _SCAN):
        length = 2 + int.from_bytes(data[at + 2 : at + 4].tobytes(), "big")
        if data[at + 1] == _APP1 and data[at + 4 : at + 10].tobytes() == b"Exif\0\0":
            kept.append(encoded[start:at])
            start = at + length
        at += length
    return torch.cat([*kept, encoded[start:]]) if kept else encoded


@dataclass(frozen=True)
class Resizing:
    """One image's way to a square of S pixels: a window is resized, and a part of the result is kept.

    Attributes:
        box: the window: left, top, right, bottom.
        width, height: of the whole resized window.
        left, top: where the square begins in it.
    """

    box: tuple[int, int, int, int]
    width: int
    height: int
    left: int = 0
    top: int = 0


def resize_windows(images: Sequence[Tensor], plans: Sequence[Resizing], size: int) -> Tensor:
    """Resize a window of each image by a triangle filter as wide as the reduction, all images together.

    Rows first, then columns, either rounded to whole values, as Pillow's and PyTorch's filters for bytes do; a value
    differs from theirs by one at most. The number of launches grows with the strongest reduction, not with the images;
    nothing is read back.

    Args:
        images: uint8 [3, H, W] of one device, each of any size.
        plans: the windows and what becomes of them.
        size: S.

    Returns:
        uint8 [B, 3, S, S].
    """
    device = images[0].device if images else torch.device("cpu")
    result = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=device)
    for first in range(0, len(images), _AT_A_TIME):
        part = slice(first, first + _AT_A_TIME)
        result[part] = _resize_together(images[part], plans[part], size)
    return result


def _resize_together(images: Sequence[Tensor], plans: Sequence[Resizing], size: int) -> Tensor:
    device = images[0].device
    flat = torch.cat([image.reshape(-1) for image in images])
    shapes = np.array([image.shape for image in images], dtype=np.int64)  # [B, (3, H, W)]
    boxes = np.array([plan.box for plan in plans], dtype=np.int64)
    outer = np.array([(plan.width, plan.height, plan.left, plan.top) for plan in plans], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))])[:-1]
    heights = boxes[:, 3] - boxes[:, 1]
    first_row = np.concatenate([[0], np.cumsum(heights)])[:-1]  # of each window among the rows of all
    image_of_row = np.repeat(np.arange(len(images)), heights)  # [R]
    row = np.arange(len(image_of_row)) - first_row[image_of_row] + boxes[image_of_row, 1]
    row_start = starts[image_of_row] + row * shapes[image_of_row, 2] + boxes[image_of_row, 0]
    plane = (shapes[:, 1] * shapes[:, 2])[image_of_row]
    packed = np.concatenate([image_of_row, row_start, plane, first_row])
    rows = len(image_of_row)
    owner, row_start_, plane_, first_row_ = _send(packed, device).split([rows, rows, rows, len(images)])

    place, weights = _filter(boxes[:, 2] - boxes[:, 0], outer[:, 0], outer[:, 2], size, device)  # [B, S], [T, B, S]
    start = (row_start_[:, None] + place[owner])[:, None]  # [R, 1, S]
    channels = torch.arange(3, device=device)[:, None]
    # Half as many bytes as int64, where that is enough: these are the largest arrays here.
    index_type = torch.int32 if len(flat) + len(weights) < 2**31 else torch.int64
    index = (start + (plane_[:, None, None] * channels)).to(index_type)  # [R, 3, S]
    total = torch.full(index.shape, 0.5, device=device)
    for tap, weight in enumerate(weights):
        # A weight beyond the window is zero; its pixel may lie beyond the last image.
        values = flat.index_select(0, (index + tap).clamp_(max=len(flat) - 1).flatten()).view(index.shape)
        total.addcmul_(values.float(), weight[owner][:, None])
    narrow = total.floor_().clamp_(0, 255).to(torch.uint8)  # [R, 3, S]

    place, weights = _filter(heights, outer[:, 1], outer[:, 3], size, device)
    index = first_row_[:, None] + place  # [B, S], rows of `narrow`
    total = torch.full((len(images), size, 3, size), 0.5, device=device)
    for tap, weight in enumerate(weights):
        total.addcmul_(narrow[(index + tap).clamp_(max=rows - 1)].float(), weight[:, :, None, None])
    return total.floor_().clamp_(0, 255).to(torch.uint8).transpose(1, 2)


def _filter(
    lengths: np.ndarray, resized: np.ndarray, offsets: np.ndarray, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the filter of each output pixel begins in its window, int64 [B, S], and its weights, float32 [T, B, S].

    Args:
        lengths: pixels of each window along the axis.
        resized: pixels of the whole result.
        offsets: the first one of them that is wanted.
        size: S, how many are wanted.
        device: where the result is needed.
    """
    scale = (lengths / resized)[:, None]
    support = np.maximum(scale, 1.0)
    centre = (np.arange(size) + offsets[:, None] + 0.5) * scale
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + support + 0.5).astype(np.int64), lengths[:, None])
    taps = np.arange(int((high - low).max()))[:, None, None]
    weights = np.maximum(1 - np.abs((low + taps - centre + 0.5) / support), 0.0) * (low + taps < high)
    weights /= weights.sum(0)
    return _send(low, device), _send(weights.astype(np.float32), device)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
