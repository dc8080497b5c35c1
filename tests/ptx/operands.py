"""Python expressions for the operands of instructions, and assignments to registers."""

from typing import TYPE_CHECKING

import numpy as np
from ptx import Instruction, Operand, float_of
from scalar_types import NUMPY, SIZE, alias, unsigned

if TYPE_CHECKING:
    from program import Program

_BLOCK_SIZES = {"%ntid": "batch.ntid", "%nctaid": "batch.nctaid"}
_PLACES = {"%tid": "batch.tid", "%ctaid": "batch.ctaid"}


class Operands:
    """The code of a basic block as it grows. In it batch are the threads, here the active ones and n their number."""

    def __init__(self, program: "Program") -> None:
        self.program, self.registers = program, program.entry.registers
        self.lines: list[str] = []
        self._temporaries = 0

    def emit(self, text: str) -> None:
        self.lines.append("    " + text)

    def temporary(self, expression: str) -> str:
        self._temporaries += 1
        self.emit(f"t{self._temporaries} = {expression}")
        return f"t{self._temporaries}"

    def constant(self, kind: str, value: int | float) -> str:
        return self.program.constant(NUMPY[kind](value))

    # ---- reading

    def read(self, operand: Operand, kind: str) -> str:
        """An operand as PTX type ``kind``."""
        tag, value, wanted = operand.tag, operand.value, NUMPY[kind]
        if tag == "reg":
            return self._register(value, kind)
        if tag == "not":
            return f"(~{self.program.variable(value)})"
        if tag == "int":
            if kind in ("f32", "f64", "pred"):
                return self.constant(kind, value)
            bits = value & ((1 << 8 * SIZE[kind]) - 1)
            return self.program.constant(np.frombuffer(bits.to_bytes(SIZE[kind], "little"), wanted)[0])
        if tag == "f32" and kind == "f64":
            return self.program.constant(np.float64(float_of(operand)))
        if tag in ("f32", "f64"):
            word = np.uint32(value) if tag == "f32" else np.uint64(value)
            return self.program.constant(word.view(wanted) if word.nbytes == SIZE[kind] else wanted(value))
        if tag == "symbol":
            return self.constant(kind, self.program.symbol(value))
        if tag == "special":
            return self._special(value, kind)
        raise NotImplementedError(f"operand {operand}")

    def _register(self, register: str, kind: str) -> str:
        name, have = self.program.variable(register), self.registers[register]
        if NUMPY[have] == NUMPY[kind]:
            return name
        if SIZE[have] == SIZE[kind]:
            return f"{name}.view({alias(kind)})"
        if SIZE[have] < SIZE[kind]:
            raise NotImplementedError(f"{register} as {kind}")
        bits = f"{name}.view(u{8 * SIZE[have]})" if have[0] == "f" else name
        low = f"{bits}.astype(u{8 * SIZE[kind]})"
        return low if alias(kind) == f"u{8 * SIZE[kind]}" else f"{low}.view({alias(kind)})"

    def _special(self, name: str, kind: str) -> str:
        root, _, axis = name.partition(".")
        cast = "" if kind in ("u32", "b32") else f".astype({alias(kind)})"
        if root in _PLACES:
            return f"{_PLACES[root]}[{'xyz'.index(axis)}][here]{cast}"
        if root in _BLOCK_SIZES:
            return f"{_BLOCK_SIZES[root]}[{'xyz'.index(axis)}]{cast}"
        if root == "%laneid":
            return f"batch.lane[here]{cast}"
        if root == "%warpid":
            return f"batch.warp_of_block[here]{cast}"
        raise NotImplementedError(name)

    def mask(self, instruction: Instruction) -> str:
        """Which of the active threads take part in a predicated access."""
        if instruction.predicate is None:
            return "None"
        return ("~" if instruction.negated else "") + self.program.variable(instruction.predicate)

    def address(self, operand: Operand) -> str:
        base, offset = operand.value, operand.offset
        if base.tag in ("symbol", "int"):
            start = base.value if base.tag == "int" else self.program.symbol(base.value)
            return self.program.constant(np.uint64((start + offset) % 2**64))
        wide = SIZE[self.registers[base.value]] == 8
        start = self.read(base, "u64" if wide else "u32")
        if offset:  # the sum wraps around as the register does
            number = np.uint64(offset % 2**64) if wide else np.uint32(offset % 2**32)
            start = f"({start} + {self.program.constant(number)})"
        return start if wide else f"{start}.astype(u64)"

    # ---- writing

    def write(self, operand: Operand, expression: str, kind: str, instruction: Instruction) -> None:
        """Assign an expression of PTX type ``kind``."""
        if operand.tag == "sink":
            self.emit(expression)
            return
        if operand.tag != "reg":
            raise NotImplementedError(instruction.text)
        have = self.registers[operand.value]
        if NUMPY[kind] != NUMPY[have]:
            if SIZE[kind] == SIZE[have]:
                expression = f"({expression}).view({alias(have)})"
            elif "f" in (np.dtype(NUMPY[kind]).kind, np.dtype(NUMPY[have]).kind):
                raise NotImplementedError(instruction.text)
            else:
                expression = f"({expression}).astype({alias(have)})"
        name = self.program.variable(operand.value)
        if instruction.predicate is not None:
            expression = f"np.where({self.mask(instruction)}, {expression}, {name})"
        self.emit(f"{name} = {expression}")

    def binary(self, instruction: Instruction, template: str, kind: str | None = None) -> None:
        """``template`` of a and b, the second and the third operand."""
        kind = kind or instruction.op[-1]
        a, b = self.read(instruction.args[1], kind), self.read(instruction.args[2], kind)
        self.write(instruction.args[0], template.format(a=a, b=b), kind, instruction)

    def three(self, instruction: Instruction, kind: str) -> tuple[str, str, str]:
        """The operands after the result."""
        a, b, c = (self.read(operand, kind) for operand in instruction.args[1:4])
        return a, b, c

    @staticmethod
    def bits_kind(kind: str) -> str:
        return kind if kind == "pred" else unsigned(kind)
