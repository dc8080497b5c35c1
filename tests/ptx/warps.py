"""What the lanes of a warp do together: shuffles, votes, reductions, matrices."""

from typing import Any

import numpy as np

u32, u64 = np.uint32, np.uint64
_ALL = u32(0xFFFFFFFF)


class Warps:
    """Each checks that the lanes that it names, and no other, are there."""

    def _check_mask(self: Any, here: Any, n: int, mask: Any, line: int, what: str) -> None:
        mask = np.broadcast_to(mask, n)
        if not ((mask >> self.lane[here]) & u32(1)).all():
            self.report(f"{what}: the mask leaves out a lane that executes it", line)
        if n == self.threads:
            return
        exist = (u64(1) << self.lanes_of_warp[here].astype(u64)) - u64(1)
        missing = mask & exist.astype(u32) & ~self.active_mask(here)
        if missing.any():
            first = int(np.flatnonzero(missing)[0])
            detail = (hex(int(missing[first])), *self.describe(int(self.everyone[here][first])))
            self.report(f"{what}: lanes of the mask are elsewhere", line, detail)

    def active_mask(self: Any, here: Any) -> Any:
        there = np.zeros(len(self.warp_start), u32)
        np.bitwise_or.at(there, self.warp[here], u32(1) << self.lane[here])
        return there[self.warp[here]]

    def sync_warp(self: Any, here: Any, n: int, mask: Any, line: int) -> None:
        """``__syncwarp``: what a lane has written, the others may read now."""
        self._check_mask(here, n, mask, line, "bar.warp.sync")
        self.warp_start[self.warp[here]] = self.machine.step + 1
        self.machine.step += 1

    def shuffle(
        self: Any,
        mode: str,
        value: Any,
        other: Any,
        limits: Any,
        mask: Any,
        here: Any,
        n: int,
        line: int,
    ) -> tuple[Any, Any]:
        """The other lanes' values, and whether there is such a lane in the segment."""
        self._check_mask(here, n, mask, line, "shfl.sync")
        values = np.zeros(self.threads, u32)
        values[here] = value
        lane = self.lane[here].astype(np.int64)
        other, limits = np.asarray(other).astype(np.int64) & 31, np.asarray(limits).astype(np.int64)
        clamp, segment = limits & 31, (limits >> 8) & 31
        bound = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - other
            inside = source >= bound
        else:
            source = {"bfly": lane ^ other, "idx": (lane & segment) | (other & ~segment), "down": lane + other}[mode]
            inside = source <= bound
        source = np.where(inside, source, lane)
        if (source >= self.lanes_of_warp[here]).any():
            self.report("shfl.sync: there is no such lane", line)
            source = np.minimum(source, self.lanes_of_warp[here] - 1)
        at = self.first_of_warp[here] + source
        if n != self.threads:
            present = np.zeros(self.threads, np.bool_)
            present[here] = True
            if not present[at].all():
                self.report("shfl.sync: a lane is read that is elsewhere", line)
        return values[at], inside

    def vote(self: Any, mode: str, value: Any, mask: Any, here: Any, n: int, line: int) -> Any:
        self._check_mask(here, n, mask, line, "vote.sync")
        warp, value = self.warp[here], np.broadcast_to(value, n)
        if mode == "ballot":
            bits = np.zeros(len(self.warp_start), u32)
            np.bitwise_or.at(bits, warp, np.where(value, u32(1), u32(0)) << self.lane[here])
            return bits[warp]
        result = np.full(len(self.warp_start), mode == "all")
        (np.logical_and if mode == "all" else np.logical_or).at(result, warp, value)
        return result[warp]

    def reduce(self: Any, what: str, value: Any, mask: Any, here: Any, n: int, line: int) -> Any:
        self._check_mask(here, n, mask, line, "redux.sync")
        warp, value = self.warp[here], np.broadcast_to(value, n)
        info = np.iinfo(value.dtype)
        function, start = {
            "add": (np.add, 0),
            "min": (np.minimum, info.max),
            "max": (np.maximum, info.min),
            "and": (np.bitwise_and, -1 if info.min else info.max),
            "or": (np.bitwise_or, 0),
            "xor": (np.bitwise_xor, 0),
        }[what]
        result = np.full(len(self.warp_start), start, value.dtype)
        function.at(result, warp, value)
        return result[warp]

    # ---- 8 x 8 matrices of 16-bit numbers in shared memory: lane i of a warp says where row i begins

    def _row(self: Any, address: Any, here: Any, matrix: int, row: Any) -> Any:
        addresses = np.zeros(self.threads, u64)
        addresses[here] = address
        return addresses[self.first_of_warp[here] + 8 * matrix + row]

    def load_matrix(self: Any, address: Any, count: int, transposed: bool, here: Any, n: int, line: int) -> Any:
        self._check_mask(here, n, _ALL, line, "ldmatrix")
        lane = self.lane[here].astype(np.int64)
        words = []
        for i in range(count):
            if not transposed:
                at = self._row(address, here, i, lane // 4) + (lane % 4 * 4).astype(u64)
                words += self.load_shared(at, u32, 1, here, n, None, line)
                continue
            halves = []
            for j in (0, 1):
                at = self._row(address, here, i, 2 * (lane % 4) + j) + (lane // 4 * 2).astype(u64)
                halves.append(self.load_shared(at, np.uint16, 1, here, n, None, line)[0].astype(u32))
            words.append(halves[0] | (halves[1] << u32(16)))
        return words

    def store_matrix(self: Any, address: Any, values: Any, transposed: bool, here: Any, n: int, line: int) -> None:
        self._check_mask(here, n, _ALL, line, "stmatrix")
        lane = self.lane[here].astype(np.int64)
        for i, value in enumerate(values):
            if not transposed:
                at = self._row(address, here, i, lane // 4) + (lane % 4 * 4).astype(u64)
                self.store_shared(at, u32, (value,), here, n, None, line)
                continue
            for j in (0, 1):
                at = self._row(address, here, i, 2 * (lane % 4) + j) + (lane // 4 * 2).astype(u64)
                half = (value >> u32(16 * j)).astype(np.uint16)
                self.store_shared(at, np.uint16, (half,), here, n, None, line)
