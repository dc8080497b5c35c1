"""Mixed precision: its context, what ``--amp auto`` comes to, and a word before bfloat16 slows a run down."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

AUTO = "auto"
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_ROUNDS = 5
_NOTABLE = 1.1  # times as long: less is within the noise of a few milliseconds


def make_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Factory of the mixed-precision context named by ``--amp``: ``off``, ``bf16`` or ``fp16``."""
    dtype = AMP_DTYPES.get(amp)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def settle_amp(amp: str, device: torch.device) -> tuple[str, str | None]:
    """What ``--amp`` means on a device.

    ``auto`` becomes the fastest of the others: bf16 on GPUs of compute capability 8.0 and up, fp16 on older ones with
    tensor cores, and on a CPU what a measurement of some milliseconds says.

    Returns:
        ``amp``, or what ``auto`` becomes; and a line for the user where there is something to say: what was chosen and
        why, or that ``bf16`` is slower than float32 on this processor.
    """
    if amp == AUTO and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chosen = "bf16" if major >= 8 else "fp16" if major == 7 else "off"
        return chosen, f"--amp auto: {chosen} ({torch.cuda.get_device_name(device)}, capability {major}.{minor})"
    if device.type != "cpu" or amp not in (AUTO, "bf16"):
        return amp, None
    ratio = bf16_time_ratio()
    measured = f"bfloat16 takes {ratio:.2f} times as long as float32 on this processor"
    if amp == AUTO:
        chosen = "bf16" if ratio < 1 else "off"
        return chosen, f"--amp auto: {chosen} ({measured})"
    return amp, f"--amp bf16: {measured}; --amp off is faster here" if ratio > _NOTABLE else None


@functools.cache
def bf16_time_ratio() -> float:
    """Time of a training step in bfloat16 over that in float32, of two small convolutions on one core.

    Measured once in a process. Processors differ by a factor of ten: AMX multiplies bfloat16 several times as fast as
    float32, AVX-512 BF16 alone is slower for such convolutions, and without either PyTorch emulates it. The times are
    the shortest of a few, taken in turn.
    """
    images = torch.ones(4, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(32, 32, 3, 3, requires_grad=True)
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a busy core would be what is measured
    try:
        for _ in range(1 + _ROUNDS):  # the first one also chooses the algorithms
            for dtype in seconds:
                seconds[dtype] = min(seconds[dtype], _step_seconds(images, weight, dtype))
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _step_seconds(images: Tensor, weight: Tensor, dtype: torch.dtype) -> float:
    started = time.perf_counter()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        convolved = torch.nn.functional.conv2d(images, weight, padding=1)
        convolved = torch.nn.functional.conv2d(convolved, weight, padding=1)
    convolved.sum().backward()
    return time.perf_counter() - started
