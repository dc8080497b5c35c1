"""Memory that a process keeps, and what the system may refuse it.

Such a refusal is no fault of the file that was to be opened just then: the error says what is lacking and what helps.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

import torch

from shike_fast.errors import RunError

_REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer --workers",
    errno.ENFILE: "the machine has too many files open: close some, or use fewer --workers",
    errno.EAGAIN: "raise the limit of processes (ulimit -u, or that of the container), or use fewer --workers",
    errno.ENOMEM: "memory has run out: use fewer --workers",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENOSPC: "make room, then repeat the command",
}
_ELSE = "see to it, then repeat the command"
# In the texts of torch, which has no exception type for them.
_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "CUDA out of memory", "CUDA error: out of memory")
_THREAD = "can't start new thread"  # Python's text: it has no exception type for that


def is_lacking(error: BaseException | None) -> bool:
    """Whether the system has refused memory, a process, a descriptor or the size of a file."""
    return isinstance(error, OSError) and error.errno in _REMEDIES


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine did not suffice, as Python, NumPy or torch say it."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _MEMORY)


def is_out_of_threads(error: BaseException) -> bool:
    """Whether no thread could be started."""
    return isinstance(error, RuntimeError) and _THREAD in str(error)


def lacking(what: str, error: OSError) -> RunError:
    """The error to show: what could not be done, why not, and what helps."""
    return RunError(f"{what} ({error.strerror or error}); {_REMEDIES.get(error.errno or 0, _ELSE)}")


def out_of_threads(what: str) -> RunError:
    """The error to show where no thread could be started."""
    return RunError(f"{what} ({_THREAD}); {_REMEDIES[errno.EAGAIN]}")


def keep_memory() -> bool:
    """Let the C library keep freed memory for the next tensors of this process.

    By default it gives large blocks back to the system, which hands them out again page by page, cleared: 36,000 page
    faults in every step of resnet32 with a batch of 128, a tenth of its time.

    Returns:
        Whether the C library can do that: glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    most = 2**31 - 2**12
    below = mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # versions before 2.35 take 32 MiB at most
    return bool(below and mallopt(trim_threshold, most))


def free_memory(device: torch.device) -> int:
    """Bytes that a process could still take: of a GPU's memory, or of the machine's and its container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    free = [int(available[1]) * 1024 if available else pages]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _text(limit).strip(), _text(used).strip()
        if most.isdecimal() and now.isdecimal():
            free.append(int(most) - int(now))
    return max(0, min(free))


def _text(path: str) -> str:
    """What a file of the system says; nothing where it has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
