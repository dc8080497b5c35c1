"""Blocks of threads that run together: their places, the order in which they run, and barriers.

Of all threads those with the lowest program counter run next, so that threads that have diverged meet again.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from global_memory import GlobalMemory
from private_memory import PrivateMemory
from program import DONE, Program
from scalar_types import NUMPY
from shared_memory import SharedMemory
from tensor_cores import TensorCores
from warps import Warps

if TYPE_CHECKING:
    from machine import Launch, Machine

WAITING = 1 << 20  # added to the program counter of a thread at a barrier
MOST_STEPS = 20_000_000


class Batch(Warps, TensorCores, GlobalMemory, SharedMemory, PrivateMemory):
    """The threads of some blocks of a launch.

    Generated code calls the methods. ``here`` are the active threads, an index into all arrays of threads; ``n`` is
    their number.
    """

    def __init__(self, machine: "Machine", program: Program, launch: "Launch", blocks: list[int]) -> None:
        self.machine, self.program, self.launch = machine, program, launch
        width, height, depth = launch.block
        self.block_threads = width * height * depth
        self.blocks, self.threads = len(blocks), self.block_threads * len(blocks)
        self._place(np.array(blocks, np.int64), width, height)
        self.pc = np.zeros(self.threads, np.int32)
        self.epoch = np.zeros(self.blocks, np.int32)  # how many barriers a block has passed
        self.epoch_start = np.zeros(self.blocks, np.int64)  # the step after the last one
        self.warp_start = np.zeros(self.blocks * self.block_warps, np.int64)  # and after a warp's own last one
        self.active = self.everyone
        self.registers: list[Any] = [None] * len(program.index)
        for register in program.kept:
            self.registers[program.index[register]] = self._unwritten(program.entry.registers[register])
        self._allocate_shared(program.static_shared + launch.dynamic_shared)
        self._allocate_local(program.entry.local_bytes)
        self._allocate_copies()

    def _place(self, block: Any, width: int, height: int) -> None:
        """What each thread knows of itself."""
        u32, threads, blocks = np.uint32, self.block_threads, self.blocks
        number = np.tile(np.arange(threads, dtype=u32), blocks)  # in the block
        self.tid = [number % u32(width), number // u32(width) % u32(height), number // u32(width * height)]
        grid = self.launch.grid
        places = (block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1]))
        self.ctaid = [np.repeat(place.astype(u32), threads) for place in places]
        self.ntid, self.nctaid = [u32(size) for size in self.launch.block], [u32(size) for size in grid]
        self.everyone = np.arange(self.threads)
        self.block_of = np.repeat(np.arange(blocks), threads)
        self.lane, self.warp_of_block = number % u32(32), number // u32(32)
        self.block_warps = (threads + 31) // 32
        self.warp = (self.block_of * self.block_warps + self.warp_of_block).astype(np.int32)
        first_lane = (number & ~u32(31)).astype(np.int64)
        self.first_of_warp = self.block_of * threads + first_lane
        self.lanes_of_warp = np.minimum(32, threads - first_lane)
        self.thread_of_launch = np.repeat(block, threads) * threads + number

    def _unwritten(self, kind: str) -> Any:
        """A register that nobody has written holds NaN: whoever uses it gets a wrong result."""
        dtype = np.dtype(NUMPY[kind])
        return np.full(self.threads * dtype.itemsize, 0xFF if kind != "pred" else 1, np.uint8).view(dtype)

    def report(self, kind: str, line: int, detail: Any = None) -> None:
        self.machine.report(kind, self.launch.name, line, detail)

    def describe(self, thread: int) -> tuple[Any, ...]:
        return "block", tuple(int(axis[thread]) for axis in self.ctaid), "thread", thread % self.block_threads

    # ---- scheduling

    def run(self) -> None:
        machine, functions = self.machine, self.program.functions
        for _ in range(MOST_STEPS):
            low = int(self.pc.min())
            if low >= WAITING:
                if low < DONE:
                    self.report("threads wait at a barrier for ever", 0, np.unique(self.pc).tolist())
                machine.step += 1
                return
            if self.launch.order.blocks == "random":
                low, self.active = self._some_warps()
            else:
                self.active = np.flatnonzero(self.pc == low)
            machine.step += 1
            count = len(self.active)
            if machine.counts is not None:
                warps = len(self.warp_start) if count == self.threads else len(np.unique(self.warp[self.active]))
                machine.counts.block(self.launch.name, low, count, warps)
            functions[low](self, slice(None) if count == self.threads else self.active, count)
            if machine.trapped:
                return
        self.report("no end", 0)

    def _some_warps(self) -> tuple[int, Any]:
        """A program counter and threads that are there: of some of the warps that are not ahead of it."""
        random = self.launch.random
        lowest = np.full(len(self.warp_start), DONE, np.int32)
        np.minimum.at(lowest, self.warp, self.pc)
        choices = np.unique(lowest[lowest < WAITING])
        low = int(choices[random.randrange(len(choices))])
        chosen = lowest == low
        if random.random() < 0.5:
            some = chosen & np.array([random.random() < 0.5 for _ in chosen])
            chosen = some if some.any() else chosen
        return low, np.flatnonzero((self.pc == low) & chosen[self.warp])

    # ---- the ends of blocks of code

    def after_exit(self) -> None:
        if (self.pc >= WAITING).any():
            self._release(0)

    def barrier(self, here: Any, after: int, line: int) -> None:
        self.pc[here] = WAITING + after
        self._release(line)

    def _release(self, line: int) -> None:
        """Let the threads of a block go on where all have come to a barrier."""
        pc = self.pc.reshape(self.blocks, self.block_threads)
        ready = np.flatnonzero((pc >= WAITING).all(1) & (pc < DONE).any(1))
        if len(ready) == 0:
            return
        of_ready = pc[ready]
        waiting = of_ready < DONE
        if not waiting.all():
            self.report("threads that have ended miss a barrier", line, int((~waiting).sum()))
        first = np.where(waiting, of_ready, DONE).min(1)
        if (np.where(waiting, of_ready, 0).max(1) != first).any():
            self.report("threads wait at different barriers", line)
        pc[ready] = np.where(waiting, of_ready - WAITING, of_ready)
        self.epoch[ready] += 1
        self.epoch_start[ready] = self.machine.step + 1

    def trap(self, line: int, text: str) -> None:
        self.report("trap", line, (text, *self.describe(int(self.active[0]))))
        self.machine.trapped = True
