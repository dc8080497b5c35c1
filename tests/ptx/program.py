"""An entry as Python functions, one a basic block, over NumPy arrays of threads."""

import re
from typing import Any

import arithmetic
import numpy as np
from generate import BlockCode
from ptx import Entry, Module
from scalar_types import ALIASES

DONE = 1 << 30  # the program counter of a thread that has ended

# What gives the same in all threads if the operands are the same.
_PURE = {
    *("mov", "cvta", "add", "sub", "mul", "mad", "and", "or", "xor", "not", "shl", "shr", "setp", "selp", "cvt"),
    *("min", "max", "div", "rem", "popc", "neg", "abs", "fma", "rcp", "bfe", "prmt"),
}
_ENDS = ("bra", "ret", "exit", "bar", "barrier", "call", "trap")  # of a basic block


class Program:
    """The functions of an entry, and which registers live from one to the next."""

    def __init__(self, module: Module, entry: Entry, global_addresses: dict[str, int]) -> None:
        self.module, self.entry, self.global_addresses = module, entry, global_addresses
        self._constants: dict[tuple[str, bytes], str] = {}
        self._environment: dict[str, Any] = {**arithmetic.FUNCTIONS, **ALIASES, "np": np, "DONE": DONE}
        self._place_shared()
        self._find_blocks()
        self.index = {name: i for i, name in enumerate(entry.registers)}
        self.uniform = self._uniform_registers()
        self._find_lives()
        source = "\n".join(BlockCode(self, i, block).source() for i, block in enumerate(self.blocks))
        exec(compile(source, f"<ptx {entry.name}>", "exec"), self._environment)
        self.functions = [self._environment[f"block{i}"] for i in range(len(self.blocks))]

    def _place_shared(self) -> None:
        """Offsets of the entry's own variables and of those of the module that it uses."""
        entry = self.entry
        self.shared, size = dict(entry.shared), entry.shared_bytes
        operands = [arg.value if arg.tag == "mem" else arg for i in entry.instructions for arg in i.args]
        used = {operand.value for operand in operands if operand.tag == "symbol"}
        for name, (alignment, length) in self.module.shared.items():
            if name in used:
                size = (size + alignment - 1) // alignment * alignment
                self.shared[name] = size
                size += length
        self.static_shared = size

    # ---- control flow

    def _find_blocks(self) -> None:
        code, labels = self.entry.instructions, self.entry.labels
        targets = {instruction.args[0].value for instruction in code if instruction.op[0] == "bra"}
        leaders = {0} | {at for name, at in labels.items() if name in targets}
        leaders |= {i + 1 for i, instruction in enumerate(code) if instruction.op[0] in _ENDS}
        starts = sorted(leader for leader in leaders if leader < len(code))
        self.blocks = [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
        index, end = {start: i for i, start in enumerate(starts)}, len(starts)
        self.target = {name: index.get(at, end) for name, at in labels.items()}
        self.successors = [self._successors_of(i) for i in range(end)]

    def _successors_of(self, i: int) -> list[int]:
        last, end = self.blocks[i][-1], len(self.blocks)
        next_one = [i + 1] if i + 1 < end else []
        if last.op[0] in ("ret", "exit"):
            return next_one if last.predicate else []
        if last.op[0] != "bra":
            return next_one
        target = self.target[last.args[0].value]
        return ([target] if target < end else []) + (next_one if last.predicate else [])

    def _uniform_registers(self) -> set[str]:
        """Registers that are the same in all threads: kept as scalars."""
        definitions: dict[str, int] = {}
        for instruction in self.entry.instructions:
            for register in instruction.results:
                definitions[register] = definitions.get(register, 0) + 1
        uniform: set[str] = set()
        grows = True
        while grows:
            grows = False
            for instruction in self.entry.instructions:
                results = instruction.results
                if not results or instruction.predicate or all(register in uniform for register in results):
                    continue
                op = instruction.op
                specials = [arg.value for arg in instruction.args[1:] if arg.tag == "special"]
                if (
                    (op[0] in _PURE or (op[0] == "ld" and "param" in op))
                    and all(definitions[register] == 1 for register in results)
                    and all(register in uniform for register in instruction.sources)
                    and all(name.startswith(("%ntid", "%nctaid")) for name in specials)
                ):
                    uniform.update(results)
                    grows = True
        return uniform

    def _find_lives(self) -> None:
        count = len(self.blocks)
        needs: list[set[str]] = []
        self.written: list[set[str]] = []  # of each block
        for block in self.blocks:
            needed: set[str] = set()
            written: set[str] = set()
            for instruction in block:
                needed.update(register for register in instruction.sources if register not in written)
                written.update(instruction.results)
            needs.append(needed)
            self.written.append(written)
        live_in: list[set[str]] = [set() for _ in range(count)]
        self.live_out: list[set[str]] = [set() for _ in range(count)]
        grows = True
        while grows:
            grows = False
            for i in reversed(range(count)):
                out = {register for successor in self.successors[i] for register in live_in[successor]}
                new = needs[i] | (out - self.written[i])
                if out != self.live_out[i] or new != live_in[i]:
                    self.live_out[i], live_in[i], grows = out, new, True
        self.kept = sorted({register for live in live_in for register in live} - self.uniform)

    # ---- what the generated code needs

    def constant(self, value: Any) -> str:
        """The name of a NumPy scalar."""
        key = type(value).__name__, value.tobytes()
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            self._environment[self._constants[key]] = value
        return self._constants[key]

    @staticmethod
    def variable(register: str) -> str:
        return "v_" + re.sub(r"\W", "_", register.lstrip("%"))

    def symbol(self, name: str) -> int:
        """The address of a variable in its space."""
        for parameter, offset, _ in self.entry.params:
            if parameter == name:
                return offset
        for variables in (self.shared, self.entry.local, self.global_addresses):
            if name in variables:
                return variables[name]
        raise NotImplementedError(f"the address of {name}")
