"""A basic block as the source of a Python function."""

from typing import TYPE_CHECKING

from generate_arithmetic import ArithmeticCode
from generate_memory import MemoryCode
from ptx import Instruction

if TYPE_CHECKING:
    from program import Program

# The end of a block says what these do; the last three do nothing that another thread sees.
_ELSEWHERE = ("bra", "ret", "exit", "call", "trap", "nanosleep", "prefetch", "griddepcontrol")


class BlockCode(ArithmeticCode, MemoryCode):
    """The function ``block<number>(batch, here, n)``: it moves n threads of a batch to their next blocks."""

    def __init__(self, program: "Program", number: int, instructions: list[Instruction]) -> None:
        super().__init__(program)
        self.number, self.instructions = number, instructions

    def source(self) -> str:
        program, number = self.program, self.number
        for instruction in self.instructions:
            self._add(instruction)
        read: dict[str, None] = {}
        written: set[str] = set()
        for instruction in self.instructions:
            read |= dict.fromkeys(register for register in instruction.sources if register not in written)
            written.update(instruction.results)
        kept = [r for r in sorted(written) if r in program.uniform or r in program.live_out[number]]
        head = [f"def block{number}(batch, here, n):", "    R = batch.registers"]
        head += [f"    {program.variable(register)} = {self._place(register)}" for register in sorted(read)]
        tail = [f"    {self._place(register)} = {program.variable(register)}" for register in kept]
        return "\n".join([*head, *self.lines, *tail, *self._end()]) + "\n"

    def _place(self, register: str) -> str:
        at = f"R[{self.program.index[register]}]"
        return at if register in self.program.uniform else f"{at}[here]"

    def _add(self, instruction: Instruction) -> None:
        op = instruction.op
        if op[0] in _ELSEWHERE:
            return
        if op[0] in ("bar", "barrier"):
            if "warp" in op:
                self.emit(f"batch.sync_warp(here, n, {self.read(instruction.args[0], 'u32')}, {instruction.line})")
            elif "sync" not in op or len(instruction.args) != 1 or instruction.args[0].value != 0:
                raise NotImplementedError(instruction.text)
            return
        method = getattr(self, f"op_{op[0]}", None)
        if method is None:
            raise NotImplementedError(instruction.text)
        method(instruction)

    def _end(self) -> list[str]:
        """Where the threads go."""
        last, end = self.instructions[-1], len(self.program.blocks)
        after = str(self.number + 1) if self.number + 1 < end else "DONE"
        if last.op[0] in ("ret", "exit"):
            return [self._jump(last, "DONE", after), "    batch.after_exit()"]
        if last.op[0] == "bra":
            target = self.program.target[last.args[0].value]
            return [self._jump(last, "DONE" if target == end else str(target), after)]
        if last.op[0] in ("bar", "barrier") and "warp" not in last.op:
            if last.predicate:
                raise NotImplementedError(last.text)
            return [f"    batch.barrier(here, {after}, {last.line})"]
        if last.op[0] in ("call", "trap"):
            return [f"    batch.trap({last.line}, {last.text!r})"]
        return [f"    batch.pc[here] = {after}"]

    def _jump(self, last: Instruction, target: str, after: str) -> str:
        if last.predicate is None:
            return f"    batch.pc[here] = {target}"
        return f"    batch.pc[here] = np.where({self.mask(last)}, {target}, {after})"
