"""Products of matrices of TF32 numbers, and the copies to shared memory that feed them.

A unit adds exact products and rounds toward zero, as such units have been measured to do. What runs beside the thread
that asked for it is simpler here: a product is there at once, and a copy arrives when its group is waited for.
"""

from typing import Any

import numpy as np
from arithmetic import round_toward_zero

u32, u64 = np.uint32, np.uint64
_ALL = u32(0xFFFFFFFF)


def _place(descriptor: Any, row: Any, column: Any) -> Any:
    """Where an element of a matrix in shared memory lies: rows of 128 bytes, eight of them swizzled together."""
    if np.any((descriptor >> u64(62)) != 1) or np.any((descriptor >> u64(49)) & u64(7)):
        raise NotImplementedError(f"wgmma: the descriptor {descriptor}")
    start, stride = (descriptor & u64(0x3FFF)) << u64(4), ((descriptor >> u64(32)) & u64(0x3FFF)) << u64(4)
    row, column = row.astype(u64), column.astype(u64)
    at = start + row // u64(8) * stride + row % u64(8) * u64(128) + column * u64(4)
    return at ^ ((at >> u64(3)) & u64(0x70))


class TensorCores:
    def multiply(self: Any, a: Any, b: Any, c: Any, here: Any, n: int, line: int) -> list[Any]:
        """``mma.m16n8k8``: a [16, 8] b [8, 8] + c [16, 8] of each warp, in the registers of its lanes."""
        self._check_mask(here, n, _ALL, line, "mma")
        return self._multiply(self._rows(a, n), [self._values(part, n) for part in b], c, n)

    def multiply_shared(
        self: Any, a: Any, b: Any, c: Any, columns: int, adds: Any, here: Any, n: int, line: int
    ) -> list[Any]:
        """``wgmma.m64nNk8``: the same for a group of four warps, 16 rows each; b lies in shared memory as [N, 8].

        ``a`` are registers, or where [64, 8] lies.
        """
        self._check_mask(here, n, _ALL, line, "wgmma")
        across, down = self.lane[here] % u32(4), self.lane[here] // u32(4)

        def load(descriptor: Any, row: Any, column: Any) -> Any:
            return self.load_shared(_place(descriptor, row, column), np.float32, 1, here, n, None, line)[0]

        if not isinstance(a, tuple):
            first = self.warp_of_block[here] % u32(4) * u32(16) + down
            a = tuple(load(a, first + u32(8 * (i % 2)), across + u32(4 * (i // 2))) for i in range(4))
        rows, results = self._rows(a, n), []
        for block in range(columns // 8):
            parts = [self._values(load(b, down + u32(8 * block), across + u32(4 * half)), n) for half in (0, 1)]
            old = [np.where(adds, part, np.float32(0)) for part in c[4 * block : 4 * block + 4]]
            results += self._multiply(rows, parts, old, n)
        return results

    @staticmethod
    def _values(x: Any, n: int) -> Any:
        """What the units see of a number, [warps, 32]."""
        bits = np.broadcast_to(x, n).view(u32) & u32(0xFFFFE000)
        return bits.view(np.float32).astype(np.float64).reshape(-1, 32)

    def _rows(self: Any, a: Any, n: int) -> Any:
        """a [warps, 16, 8] from its registers."""
        lane, matrix = np.arange(32), np.empty((n // 32, 16, 8))
        for i, part in enumerate(a):
            matrix[:, lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)] = self._values(part, n)
        return matrix

    @staticmethod
    def _multiply(a: Any, b: Any, c: Any, n: int) -> list[Any]:
        lane, right, total = np.arange(32), np.empty((n // 32, 8, 8)), np.empty((n // 32, 16, 8))
        for i, part in enumerate(b):
            right[:, lane % 4 + 4 * i, lane // 4] = part
        places = [(slice(None), lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2) for i in range(4)]
        for place, part in zip(places, c, strict=True):
            total[place] = np.broadcast_to(part, n).reshape(-1, 32)
        with np.errstate(invalid="ignore"):  # of infinities, which become NaN
            total = round_toward_zero(a @ right + total)
        return [total[place].reshape(-1) for place in places]

    # ---- copies to shared memory, in groups

    def _allocate_copies(self: Any) -> None:
        self.copies: list[tuple[Any, ...]] = []  # threads, addresses, values, groups, line
        self.copy_group = np.zeros(self.threads, np.int64)  # that a thread fills

    def copy_async(
        self: Any, to: Any, source: Any, size: int, given: Any, here: Any, n: int, mask: Any, line: int
    ) -> None:
        """``size`` bytes, of which ``given`` are read: all, or none and 0 is written."""
        there = np.broadcast_to(given, n) == size
        if (~there & (np.broadcast_to(given, n) != 0)).any():
            raise NotImplementedError("cp.async of a part")
        does = np.ones(n, np.bool_) if mask is None else np.broadcast_to(mask, n)
        values = self.load_global(source, u32, size // 4, here, n, does & there, line)
        threads = self.active[does]
        values = [np.broadcast_to(value, n)[does] for value in values]
        self.copies.append((threads, np.broadcast_to(to, n)[does], values, self.copy_group[threads], line))

    def commit_copies(self: Any, here: Any) -> None:
        self.copy_group[here] += 1

    def wait_copies(self: Any, left: int, here: Any, n: int) -> None:
        """Until at most ``left`` groups are under way."""
        waits = np.zeros(self.threads, np.bool_)
        waits[here] = True
        under_way, self.copies = self.copies, []
        for threads, to, values, group, line in under_way:
            ready = waits[threads] & (group < self.copy_group[threads] - left)
            if not ready.all():
                late = ~ready
                self.copies.append((threads[late], to[late], [value[late] for value in values], group[late], line))
            at = np.searchsorted(self.active, threads[ready])
            mask, address = np.zeros(n, np.bool_), np.zeros(n, u64)
            mask[at], address[at] = True, to[ready]
            spread = [self.spread(value[ready], at, n) for value in values]
            self.store_shared(address, u32, spread, here, n, mask, line)
