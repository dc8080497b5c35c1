"""Code for the instructions that access memory or other lanes: each method adds that of one instruction."""

import re

from operands import Operands
from ptx import Instruction, Operand
from scalar_types import alias

SHARED_BASE, PARAM_BASE, LOCAL_BASE = 1 << 60, 1 << 59, 1 << 58  # of generic addresses
_BASES = {"shared": SHARED_BASE, "param": PARAM_BASE, "local": LOCAL_BASE, "global": 0}
_SPACES = ("global", "shared", "local", "param", "const")
_ATOMIC = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc")
_WIDTHS = {"v2": 2, "v4": 4, "v8": 8}


def _space(i: Instruction) -> str:
    return next((part for part in (word.split("::")[0] for word in i.op) if part in _SPACES), "generic")


class MemoryCode(Operands):
    def op_cvta(self, i: Instruction) -> None:
        to_space = i.op[1] == "to"
        address = self.read(i.args[1], "u64")
        base = _BASES[i.op[2] if to_space else i.op[1]]
        result = f"({address} {'-' if to_space else '+'} u64({base}))" if base else f"{address}.copy()"
        self.write(i.args[0], result, "u64", i)

    def op_ld(self, i: Instruction) -> None:
        kind, space, address = i.op[-1], _space(i), self.address(i.args[1])
        count = next((number for width, number in _WIDTHS.items() if width in i.op), 1)
        if space == "param":
            call = f"batch.load_param({address}, {alias(kind)}, {count}, {i.line})"
        else:
            mask = self.mask(i)
            cached = f", {'nc' in i.op}" if space in ("global", "generic") else ""
            call = f"batch.load_{space}({address}, {alias(kind)}, {count}, here, n, {mask}, {i.line}{cached})"
        loaded = self.temporary(call)
        for n, part in enumerate(i.args[0].value if i.args[0].tag == "vec" else [i.args[0]]):
            if part.tag != "sink":
                self.write(part, f"{loaded}[{n}]", kind, i)

    op_ldu = op_ld

    def op_st(self, i: Instruction) -> None:
        kind, space = i.op[-1], _space(i)
        if space == "param":  # of a call
            return
        parts = i.args[1].value if i.args[1].tag == "vec" else [i.args[1]]
        values = ", ".join(self.read(part, kind) for part in parts)
        call = f"{self.address(i.args[0])}, {alias(kind)}, ({values},), here, n, {self.mask(i)}, {i.line}"
        self.emit(f"batch.store_{space}({call})")

    def _atomic(self, i: Instruction, address: str, values: list[str]) -> str:
        if _space(i) not in ("global", "generic"):
            raise NotImplementedError(i.text)
        what = next(part for part in i.op if part in _ATOMIC)
        values_text = ", ".join(values)
        return (
            f"batch.atomic({address}, {alias(i.op[-1])}, {what!r}, ({values_text},), here, n, {self.mask(i)}, {i.line})"
        )

    def op_atom(self, i: Instruction) -> None:
        kind = i.op[-1]
        values = [self.read(operand, kind) for operand in i.args[2:]]
        if "release" in i.op or "acq_rel" in i.op:
            self.emit("batch.fence(here)")
        self.write(i.args[0], self._atomic(i, self.address(i.args[1]), values), kind, i)
        if "acquire" in i.op or "acq_rel" in i.op:
            self.emit("batch.fence(here)")

    def op_red(self, i: Instruction) -> None:
        self.emit(self._atomic(i, self.address(i.args[0]), [self.read(i.args[1], i.op[-1])]))

    def op_membar(self, i: Instruction) -> None:
        self.emit("batch.fence(here)")

    def op_fence(self, i: Instruction) -> None:
        if "proxy" not in i.op:  # between kinds of access to shared memory, which are one here
            self.op_membar(i)

    def op_cp(self, i: Instruction) -> None:
        if "commit_group" in i.op:
            self.emit("batch.commit_copies(here)")
        elif "wait_group" in i.op:
            self.emit(f"batch.wait_copies({i.args[0].value}, here, n)")
        elif i.op[1:] in (["async", "ca", "shared", "global"], ["async", "cg", "shared", "global"]):
            size = i.args[2].value
            given = self.read(i.args[3], "u32") if len(i.args) > 3 else size
            places = f"{self.address(i.args[0])}, {self.address(i.args[1])}"
            self.emit(f"batch.copy_async({places}, {size}, {given}, here, n, {self.mask(i)}, {i.line})")
        else:
            raise NotImplementedError(i.text)

    # ---- warps

    def op_shfl(self, i: Instruction) -> None:
        mode = next(part for part in ("bfly", "idx", "up", "down") if part in i.op)
        value, other, limits, mask = (self.read(operand, "u32") for operand in i.args[1:5])
        both = self.temporary(f"batch.shuffle({mode!r}, {value}, {other}, {limits}, {mask}, here, n, {i.line})")
        to, *inside = i.args[0].value if i.args[0].tag == "pair" else [i.args[0]]
        self.write(to, f"{both}[0]", "u32", i)
        for flag in inside:
            if flag.tag != "sink":
                self.write(flag, f"{both}[1]", "pred", i)

    def op_vote(self, i: Instruction) -> None:
        mode = next(part for part in ("all", "any", "ballot") if part in i.op)
        value, mask = self.read(i.args[1], "pred"), self.read(i.args[2], "u32")
        result = "u32" if mode == "ballot" else "pred"
        self.write(i.args[0], f"batch.vote({mode!r}, {value}, {mask}, here, n, {i.line})", result, i)

    def op_redux(self, i: Instruction) -> None:
        what = next(part for part in ("add", "min", "max", "and", "or", "xor") if part in i.op)
        value, mask = self.read(i.args[1], i.op[-1]), self.read(i.args[2], "u32")
        self.write(i.args[0], f"batch.reduce({what!r}, {value}, {mask}, here, n, {i.line})", i.op[-1], i)

    def op_activemask(self, i: Instruction) -> None:
        self.write(i.args[0], "batch.active_mask(here)", "u32", i)

    def op_ldmatrix(self, i: Instruction) -> None:
        self._check_matrix(i)
        count = int(next(part for part in i.op if re.fullmatch(r"x\d", part))[1])
        call = f"batch.load_matrix({self.address(i.args[1])}, {count}, {'trans' in i.op}, here, n, {i.line})"
        loaded = self.temporary(call)
        for n, part in enumerate(i.args[0].value):
            self.write(part, f"{loaded}[{n}]", "u32", i)

    def op_stmatrix(self, i: Instruction) -> None:
        self._check_matrix(i)
        values = ", ".join(self.read(part, "u32") for part in i.args[1].value)
        self.emit(f"batch.store_matrix({self.address(i.args[0])}, ({values},), {'trans' in i.op}, here, n, {i.line})")

    def op_mma(self, i: Instruction) -> None:
        if i.predicate or i.op[3:] != ["m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"]:
            raise NotImplementedError(i.text)
        a, b, c = (self._floats(operand.value) for operand in i.args[1:])
        self._write_floats(i, f"batch.multiply({a}, {b}, {c}, here, n, {i.line})")

    def op_wgmma(self, i: Instruction) -> None:
        if i.op[1] in ("fence", "commit_group", "wait_group"):
            return
        shape = re.fullmatch(r"m64n(\d+)k8", i.op[4])
        if i.predicate or not shape or i.op[5:] != ["f32", "tf32", "tf32"]:
            raise NotImplementedError(i.text)
        if [operand.value for operand in i.args[4:]] != [1, 1]:  # a factor of -1
            raise NotImplementedError(i.text)
        left = i.args[1]
        a = self._floats(left.value) if left.tag == "vec" else self.read(left, "u64")
        c = self._floats(i.args[0].value)
        b, adds = self.read(i.args[2], "u64"), self.read(i.args[3], "pred")
        self._write_floats(i, f"batch.multiply_shared({a}, {b}, {c}, {shape[1]}, {adds}, here, n, {i.line})")

    def _floats(self, operands: list[Operand]) -> str:
        return f"({', '.join(self.read(operand, 'f32') for operand in operands)},)"

    def _write_floats(self, i: Instruction, expression: str) -> None:
        product = self.temporary(expression)
        for n, part in enumerate(i.args[0].value):
            self.write(part, f"{product}[{n}]", "f32", i)

    @staticmethod
    def _check_matrix(i: Instruction) -> None:
        if "m8n8" not in i.op or i.op[-1] != "b16":
            raise NotImplementedError(i.text)
