"""Global memory: each access is checked for its place, its alignment, what lies there, and its order with others."""

from typing import Any

import numpy as np

u64 = np.uint64
_ONES = {1: np.uint8(0x01), 2: np.uint16(0x0101), 4: np.uint32(0x01010101), 8: u64(0x0101010101010101)}
ALLOCATED = _ONES  # by width: that bit of each byte
WRITTEN = {width: ones << ones.dtype.type(1) for width, ones in _ONES.items()}
_UPDATES = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "exch": lambda _, value: value,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "inc": lambda old, value: 0 if old >= value else old + 1,
}


class GlobalMemory:
    def participants(self: Any, address: Any, mask: Any, n: int) -> tuple[Any, Any, Any]:
        """The threads that access, their addresses, and where among the active threads they are (None: all of them)."""
        address = np.broadcast_to(address, n)
        if mask is None:
            return self.active, address, None
        at = np.flatnonzero(np.broadcast_to(mask, n))
        return self.active[at], address[at], at

    @staticmethod
    def spread(values: Any, at: Any, n: int) -> Any:
        """What participants have loaded, for all active threads."""
        if at is None:
            return values
        whole = np.zeros(n, values.dtype)
        whole[at] = values
        return whole

    def _offsets(self: Any, address: Any, width: int, threads: Any, line: int, what: str) -> Any:
        """Offsets in the arena; an access that cannot be made is reported and made elsewhere."""
        offset = address - u64(self.machine.base)
        outside = offset >= u64(self.machine.size - width)
        if outside.any():
            self._report_access(f"{what}: outside of all memory", line, threads, address, outside)
            offset = np.where(outside, u64(0), offset)
        crooked = (offset & u64(width - 1)) != 0
        if crooked.any():
            self._report_access(f"{what}: misaligned access of {width} bytes", line, threads, address, crooked)
            offset = offset & ~u64(width - 1)
        return offset.astype(np.int64)

    def _report_access(self: Any, kind: str, line: int, threads: Any, address: Any, wrong: Any) -> None:
        first = int(np.flatnonzero(wrong)[0])
        self.report(kind, line, (*self.describe(int(threads[first])), "address", hex(int(address[first]))))

    def load_global(
        self: Any, address: Any, dtype: Any, count: int, here: Any, n: int, mask: Any, line: int, cached: bool = False
    ) -> list[Any]:
        threads, address, at = self.participants(address, mask, n)
        dtype = np.dtype(dtype)
        width = dtype.itemsize
        if len(threads) == 0:
            return [np.zeros(n, dtype)] * count
        offset = self._offsets(address, width * count, threads, line, "ld.global")
        view, states = self.machine.views[dtype], self.machine.state_views[width]
        results = []
        for i in range(count):
            state = states[offset // width + i]
            free, unwritten = (state & ALLOCATED[width]) != ALLOCATED[width], (state & WRITTEN[width]) != WRITTEN[width]
            if free.any():
                self._report_access("ld.global: not allocated", line, threads, address, free)
            elif unwritten.any():
                self._report_access("ld.global: never written", line, threads, address, unwritten)
            results.append(self.spread(view[offset // width + i], at, n))
        self._check_read(offset, width * count, threads, cached, line)
        self._count(offset, width * count, threads, "ld", line)
        return results

    def store_global(self: Any, address: Any, dtype: Any, values: Any, here: Any, n: int, mask: Any, line: int) -> None:
        threads, address, at = self.participants(address, mask, n)
        if len(threads) == 0:
            return
        dtype, count = np.dtype(dtype), len(values)
        width = dtype.itemsize
        offset = self._offsets(address, width * count, threads, line, "st.global")
        view, states = self.machine.views[dtype], self.machine.state_views[width]
        bits = self.machine.views[np.dtype(f"u{width}")]
        contradicted = False  # by another thread, in the same instruction
        for i, value in enumerate(values):
            index = offset // width + i
            value = np.array(np.broadcast_to(value, n) if at is None else np.broadcast_to(value, n)[at], dtype)
            free = (states[index] & ALLOCATED[width]) != ALLOCATED[width]
            if free.any():
                self._report_access("st.global: not allocated", line, threads, address, free)
                index, value = index[~free], value[~free]
            view[index] = value
            states[index] |= WRITTEN[width]
            contradicted |= bool((bits[index] != value.view(bits.dtype)).any())
        self._check_write(offset, width * count, threads, line, contradicted)
        self._count(offset, width * count, threads, "st", line)

    def atomic(
        self: Any, address: Any, dtype: Any, what: str, values: Any, here: Any, n: int, mask: Any, line: int
    ) -> Any:
        """The old values."""
        machine = self.machine
        threads, address, at = self.participants(address, mask, n)
        dtype = np.dtype(dtype)
        width = dtype.itemsize
        result = np.zeros(n, dtype)
        if len(threads) == 0:
            return result
        index = self._offsets(address, width, threads, line, "atom") // width
        both = ALLOCATED[width] | WRITTEN[width]
        wrong = (machine.state_views[width][index] & both) != both
        if wrong.any():
            self._report_access("atom: not allocated or never written", line, threads, address, wrong)
        sequence = list(range(len(threads)))
        if self.launch.order.blocks == "descending":
            sequence.reverse()
        elif self.launch.order.blocks == "random":
            self.launch.random.shuffle(sequence)
        places = np.arange(n) if at is None else at
        values = [np.broadcast_to(value, n)[places] for value in values]
        view = machine.views[dtype]
        for i in sequence:
            old = view[index[i]]
            if what == "cas":
                view[index[i]] = values[1][i] if old == values[0][i] else old
            else:
                view[index[i]] = _UPDATES[what](old, values[0][i])
            result[places[i]] = old
        machine.step += 1
        me = self.thread_of_launch[threads]
        self.launch.atomics[me] = self.launch.block_atomics[me // self.block_threads] = machine.step
        self.launch.released[me] = self.launch.fenced[me]
        return result

    def fence(self: Any, here: Any) -> None:
        self.machine.step += 1
        self.launch.fenced[self.thread_of_launch[here]] = self.machine.step

    # ---- generic addresses: of global memory, or of shared memory beyond its base

    def _space_of(self: Any, address: Any, mask: Any, n: int) -> tuple[Any, Any, Any]:
        """The addresses, who accesses shared and who global memory."""
        address = np.broadcast_to(address, n)
        shared = (address >= u64(1 << 60)) & (address < u64(2 << 60))
        relevant = np.ones(n, np.bool_) if mask is None else np.broadcast_to(mask, n)
        return address, shared & relevant, ~shared & relevant

    def load_generic(
        self: Any, address: Any, dtype: Any, count: int, here: Any, n: int, mask: Any, line: int, cached: bool = False
    ) -> list[Any]:
        address, shared, other = self._space_of(address, mask, n)
        if not shared.any():
            return self.load_global(address, dtype, count, here, n, mask, line, cached)
        inside = self.load_shared(address - u64(1 << 60), dtype, count, here, n, shared, line)
        outside = self.load_global(address, dtype, count, here, n, other, line, cached)
        return [np.where(shared, a, b) for a, b in zip(inside, outside, strict=True)]

    def store_generic(
        self: Any, address: Any, dtype: Any, values: Any, here: Any, n: int, mask: Any, line: int
    ) -> None:
        address, shared, other = self._space_of(address, mask, n)
        if shared.any():
            self.store_shared(address - u64(1 << 60), dtype, values, here, n, shared, line)
        if other.any():
            self.store_global(address, dtype, values, here, n, other, line)

    # ---- the order of accesses

    def _check_read(self: Any, offset: Any, width: int, threads: Any, cached: bool, line: int) -> None:
        machine, page = self.machine, offset >> 8
        if cached:
            machine.page_cached[page] = self.launch.start
        touched = machine.page_written[page] == self.launch.start
        if not touched.any():
            return
        if cached:
            self.report("ld.global.nc of what the same launch writes", line)
        self._check_order(offset[touched], width, threads[touched], line, "read")

    def _check_write(self: Any, offset: Any, width: int, threads: Any, line: int, contradicted: bool) -> None:
        machine, page = self.machine, offset >> 8
        if (machine.page_cached[page] == self.launch.start).any():
            self.report("st.global to what the same launch reads with ld.global.nc", line)
        machine.page_written[page] = self.launch.start
        self._check_order(offset, width, threads, line, "written")
        me = self.thread_of_launch[threads]
        for i in range(0, max(width, 2), 2):
            unit = (offset + i) >> 1
            machine.write_step[unit] = machine.step
            machine.write_thread[unit] = me
            if contradicted and (machine.write_thread[unit] != me).any():
                self.report("global memory: two threads write different values to one place in one instruction", line)

    def _check_order(self: Any, offset: Any, width: int, threads: Any, line: int, what: str) -> None:
        """That the writes of other threads, in this launch, happened before what these threads do now."""
        machine, launch, block = self.machine, self.launch, self.block_threads
        me = self.thread_of_launch[threads]
        for i in range(0, max(width, 2), 2):
            unit = (offset + i) >> 1
            step, writer = machine.write_step[unit], machine.write_thread[unit].astype(np.int64)
            foreign = (step >= launch.start) & (writer != me)
            if not foreign.any():
                continue
            same_block = writer // block == me // block
            same_warp = same_block & (writer % block // 32 == me % block // 32)
            after_barrier = step < self.epoch_start[self.block_of[threads]]
            after_sync = after_barrier | (step < self.warp_start[self.warp[threads]])
            if (foreign & same_block & ~same_warp & ~after_barrier).any():
                self.report(f"global memory: {what} without a barrier after a write of another warp", line)
            if (foreign & same_warp & ~after_sync).any():
                self.report(f"global memory: {what} without __syncwarp after a write of another lane", line)
            # A fence and an atomic operation on the writer's side, then an atomic operation and a fence on this one.
            released = launch.released[writer] > step
            own_atomic = launch.block_atomics[me // block]
            acquired = (own_atomic >= launch.atomics[writer]) & (launch.fenced[me] > own_atomic)
            if (foreign & ~same_block & ~(released & acquired)).any():
                self.report(f"global memory: {what} without release and acquire after a write of another block", line)

    def _count(self: Any, offset: Any, width: int, threads: Any, kind: str, line: int) -> None:
        if self.machine.counts is not None:
            warps = self.warp[threads].astype(np.int64)
            self.machine.counts.sectors((self.launch.name, line, kind, width), warps, offset, width)
