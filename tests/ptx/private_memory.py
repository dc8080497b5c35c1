"""What no other thread writes: the parameters of a kernel, and a thread's local memory."""

from typing import Any

import numpy as np


class PrivateMemory:
    def load_param(self: Any, address: Any, dtype: Any, count: int, line: int) -> list[Any]:
        params, width = self.launch.params, np.dtype(dtype).itemsize
        address = np.asarray(address).astype(np.int64)
        wrong = (address < 0) | (address > len(params) - width * count) | (address % (width * count) != 0)
        if wrong.any():
            self.report("ld.param: outside or misaligned", line, int(address.max()))
            address = np.clip(address // width * width, 0, max(len(params) - width * count, 0))
        words = np.frombuffer(params, dtype, len(params) // width)
        return [words[address // width + i] for i in range(count)]

    def _allocate_local(self: Any, size: int) -> None:
        self.local_bytes = size
        self.local_stride = (size + 15) // 16 * 16
        memory = np.full(self.threads * self.local_stride, 0xFF, np.uint8)
        self.local_views = {dtype: memory.view(dtype) for dtype in self.machine.views} if size else {}
        self.local_written = np.zeros(len(memory), np.bool_)

    def _local_offsets(self: Any, address: Any, width: int, threads: Any, line: int, what: str) -> Any:
        offset = address.astype(np.int64)
        wrong = (offset < 0) | (offset > self.local_bytes - width) | (offset % width != 0)
        if wrong.any():
            self.report(f"{what}: outside or misaligned", line, int(offset[wrong][0]))
            offset = np.clip(offset // width * width, 0, self.local_bytes - width)
        return threads * self.local_stride + offset

    def load_local(
        self: Any, address: Any, dtype: Any, count: int, here: Any, n: int, mask: Any, line: int
    ) -> list[Any]:
        threads, address, at = self.participants(address, mask, n)
        dtype = np.dtype(dtype)
        width = dtype.itemsize
        offset = self._local_offsets(address, width * count, threads, line, "ld.local")
        for i in range(width * count):
            if not self.local_written[offset + i].all():
                self.report("ld.local: never written", line)
        return [self.spread(self.local_views[dtype][offset // width + i], at, n) for i in range(count)]

    def store_local(self: Any, address: Any, dtype: Any, values: Any, here: Any, n: int, mask: Any, line: int) -> None:
        threads, address, at = self.participants(address, mask, n)
        dtype = np.dtype(dtype)
        width = dtype.itemsize
        offset = self._local_offsets(address, width * len(values), threads, line, "st.local")
        for i, value in enumerate(values):
            value = np.broadcast_to(value, n)
            self.local_views[dtype][offset // width + i] = value if at is None else value[at]
        for i in range(width * len(values)):
            self.local_written[offset + i] = True
