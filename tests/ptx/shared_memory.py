"""Shared memory: each access is checked for its place, its alignment, and races between the warps of a block."""

from typing import Any

import numpy as np

_SEVERAL = -2  # warps


class SharedMemory:
    def _allocate_shared(self: Any, size: int) -> None:
        self.shared_bytes = size
        self.shared_stride = (size + 15) // 16 * 16
        if size == 0:
            return
        memory = np.full(self.blocks * self.shared_stride, 0xFF, np.uint8)
        self.shared_views = {dtype: memory.view(dtype) for dtype in self.machine.views}
        units = len(memory) // 2  # of 2 bytes
        self.shared_written = np.zeros(units, np.bool_)
        # The epoch of the last write and read of each unit, and the warp that made it.
        self.write_epoch, self.write_warp = np.full(units, -1, np.int32), np.zeros(units, np.int32)
        self.read_epoch, self.read_warp = np.full(units, -1, np.int32), np.zeros(units, np.int32)

    def _shared_offsets(self: Any, address: Any, width: int, threads: Any, line: int, what: str) -> Any:
        """Offsets in the memory of all blocks; an access that cannot be made is reported and made elsewhere."""
        offset = address.astype(np.int64)
        outside = (offset < 0) | (offset > self.shared_bytes - width)
        if outside.any():
            self.report(f"{what}: outside of the block's memory", line, int(offset[outside][0]))
            offset = np.where(outside, 0, offset)
        if (offset & (width - 1)).any():
            self.report(f"{what}: misaligned access of {width} bytes", line)
            offset = offset & ~(width - 1)
        return self.block_of[threads] * self.shared_stride + offset

    def load_shared(
        self: Any, address: Any, dtype: Any, count: int, here: Any, n: int, mask: Any, line: int
    ) -> list[Any]:
        threads, address, at = self.participants(address, mask, n)
        dtype = np.dtype(dtype)
        width = dtype.itemsize
        if len(threads) == 0:
            return [np.zeros(n, dtype)] * count
        if self.shared_bytes < width * count:
            self.report("ld.shared: outside of the block's memory", line, self.shared_bytes)
            return [np.zeros(n, dtype)] * count
        offset = self._shared_offsets(address, width * count, threads, line, "ld.shared")
        view, warp, epoch = self.shared_views[dtype], self.warp[threads], self.epoch[self.block_of[threads]]
        for i in range(0, width * count, 2):
            unit = (offset + i) >> 1
            unwritten = ~self.shared_written[unit]
            if unwritten.any():
                self.report("ld.shared: never written", line, int(offset[unwritten][0]) % self.shared_stride)
            if ((self.write_epoch[unit] == epoch) & (self.write_warp[unit] != warp)).any():
                self.report("shared memory: read without a barrier after a write of another warp", line)
            others = (self.read_epoch[unit] == epoch) & (self.read_warp[unit] != warp)
            self.read_epoch[unit] = epoch
            self.read_warp[unit] = np.where(others, _SEVERAL, warp)
            clash = (self.read_warp[unit] != warp) & ~others  # in this instruction
            self.read_warp[unit[clash]] = _SEVERAL
        self._count_banks(offset, width * count, threads, "ld", line)
        return [self.spread(view[offset // width + i], at, n) for i in range(count)]

    def store_shared(self: Any, address: Any, dtype: Any, values: Any, here: Any, n: int, mask: Any, line: int) -> None:
        threads, address, at = self.participants(address, mask, n)
        if len(threads) == 0:
            return
        dtype, count = np.dtype(dtype), len(values)
        width = dtype.itemsize
        if self.shared_bytes < width * count:
            self.report("st.shared: outside of the block's memory", line, self.shared_bytes)
            return
        offset = self._shared_offsets(address, width * count, threads, line, "st.shared")
        view, bits = self.shared_views[dtype], self.shared_views[np.dtype(f"u{width}")]
        changed = np.zeros(len(threads), np.bool_)  # writing what is there already harms nobody
        for i, value in enumerate(values):
            index = offset // width + i
            value = np.array(np.broadcast_to(value, n) if at is None else np.broadcast_to(value, n)[at], dtype)
            changed |= bits[index] != value.view(bits.dtype)
            view[index] = value
            if (bits[index] != value.view(bits.dtype)).any():
                self.report("shared memory: two threads write different values to one place in one instruction", line)
        warp, epoch = self.warp[threads], self.epoch[self.block_of[threads]]
        for i in range(0, width * count, 2):
            unit = (offset + i) >> 1
            self.shared_written[unit] = True
            if ((self.write_epoch[unit] == epoch) & (self.write_warp[unit] != warp) & changed).any():
                self.report("shared memory: written without a barrier after a write of another warp", line)
            if ((self.read_epoch[unit] == epoch) & (self.read_warp[unit] != warp) & changed).any():
                self.report("shared memory: written without a barrier after a read of another warp", line)
            self.write_epoch[unit] = epoch
            self.write_warp[unit] = warp
        self._count_banks(offset, width * count, threads, "st", line)

    def _count_banks(self: Any, offset: Any, width: int, threads: Any, kind: str, line: int) -> None:
        if self.machine.counts is not None:
            warps, lanes = self.warp[threads].astype(np.int64), self.lane[threads].astype(np.int64)
            self.machine.counts.banks((self.launch.name, line, kind, width), warps, lanes, offset, width)
