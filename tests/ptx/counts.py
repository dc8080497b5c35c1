"""How often code runs and what its accesses cost: the figures behind the kernels' speed."""

import collections
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Access = tuple[str, int, str, int]  # kernel, line of the PTX, ld or st, bytes a thread


@dataclass
class Traffic:
    """Of one instruction that accesses global memory."""

    requests: int = 0  # of warps
    sectors: int = 0  # of 32 bytes
    least: int = 0  # sectors that the bytes would fill
    bytes: int = 0


@dataclass
class Banks:
    """Of one instruction that accesses shared memory."""

    requests: int = 0  # of warps
    wavefronts: int = 0  # in which they are served
    least: int = 0  # without conflicts


@dataclass
class Counts:
    threads: collections.Counter = field(default_factory=collections.Counter)  # (kernel, block) -> runs of threads
    warps: collections.Counter = field(default_factory=collections.Counter)  # and of warps
    memory: dict[Access, Traffic] = field(default_factory=dict)
    shared: dict[Access, Banks] = field(default_factory=dict)

    def block(self, kernel: str, number: int, threads: int, warps: int) -> None:
        """A basic block has run."""
        self.threads[kernel, number] += threads
        self.warps[kernel, number] += warps

    def sectors(self, access: Access, warps: Any, offset: Any, width: int) -> None:
        traffic = self.memory.setdefault(access, Traffic())
        traffic.requests += len(np.unique(warps))
        traffic.sectors += len(np.unique((warps << 40) | (offset >> 5)))
        places = np.unique((warps << 40) | offset)
        _, count = np.unique(places >> 40, return_counts=True)
        traffic.least += int(((count * width + 31) // 32).sum())
        traffic.bytes += len(offset) * width

    def banks(self, access: Access, warps: Any, lanes: Any, offset: Any, width: int) -> None:
        banks = self.shared.setdefault(access, Banks())
        together = {16: 8, 8: 16}.get(width, 32)  # lanes that are served at a time
        group = warps * (32 // together) + lanes // together
        words = [(group << 40) | ((offset >> 2) + i) for i in range(max(1, width // 4))]
        unique = np.unique(np.concatenate(words))
        bank, count = np.unique(((unique >> 40) << 8) | (unique & 31), return_counts=True)
        most = np.zeros(int(group.max()) + 1, np.int64)
        np.maximum.at(most, bank >> 8, count)
        banks.requests += len(np.unique(warps))
        banks.wavefronts += int(most.sum())
        banks.least += len(np.unique(group))
