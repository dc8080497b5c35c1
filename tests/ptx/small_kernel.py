"""Kernels of a few lines of PTX, for the tests of the interpreter."""

import struct
from typing import Any

import numpy as np
from machine import Machine, Order
from ptx import Module

BASE, DATA, SIZE = 1 << 20, 1024, 8192  # the arena, the memory of a kernel in it
WORDS = (SIZE - 2 * DATA) // 4

PROLOGUE = """
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<30>;
    .reg .b64 %rd<30>;
    .reg .f32 %f<30>;
    ld.param.u64 %rd0, [memory];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    mul.wide.s32 %rd1, %r3, 4;
    add.s64 %rd2, %rd0, %rd1;
"""  # %rd2: a word for each thread of the launch


class Kernel:
    """Runs the body of a kernel with ``memory`` [words] as its parameter."""

    def __init__(self) -> None:
        self.arena, self.state = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        self.state[DATA:-DATA] = 1
        self.machine = Machine(BASE, self.arena, self.state)

    @property
    def memory(self) -> Any:
        return self.arena[DATA:-DATA].view(np.uint32)

    def write(self, values: Any) -> None:
        data = np.asarray(values).tobytes()
        self.arena[DATA : DATA + len(data)] = np.frombuffer(data, np.uint8)
        self.state[DATA : DATA + len(data)] = 3

    def __call__(
        self,
        body: str,
        threads: int = 32,
        blocks: int = 1,
        shared: str = "",
        limit: str = "",
        order: Order | None = None,
    ) -> int:
        text = f".visible .entry kernel(.param .u64 memory) {limit}\n{{{shared}{PROLOGUE}{body}\n ret;\n}}\n"
        self.machine.add_module(Module(text), lambda _: 0)
        self.machine.order = order or Order()
        return self.machine.launch("kernel", (blocks, 1, 1), (threads, 1, 1), struct.pack("<Q", BASE + DATA))

    @property
    def reports(self) -> list[str]:
        return [*self.machine.reported()]


def words(kernel: Kernel, count: int, dtype: Any = np.uint32) -> list[Any]:
    return kernel.memory[:count].view(dtype).tolist()
