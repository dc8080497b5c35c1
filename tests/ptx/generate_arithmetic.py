"""Code for the instructions that compute: each method adds that of one instruction."""

from operands import Operands
from ptx import Instruction
from scalar_types import SIZE, alias, unsigned

FLOATS = ("f32", "f64")
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_OPPOSITES = {"neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")


class ArithmeticCode(Operands):
    def _float(self, i: Instruction, template: str) -> None:
        kind = i.op[-1]
        if "ftz" in i.op:
            template = f"ftz({template.format(a='ftz({a})', b='ftz({b})')})"
        if any(mode in i.op for mode in ("rz", "rm", "rp")):
            raise NotImplementedError(i.text)
        self.binary(i, template, kind)

    def _ring(self, i: Instruction, symbol: str) -> None:
        kind = i.op[-1]
        if kind in FLOATS:
            self._float(i, f"({{a}} {symbol} {{b}})")
        elif kind.startswith(("f16", "bf16")) or "sat" in i.op:
            raise NotImplementedError(i.text)
        else:
            self.binary(i, f"({{a}} {symbol} {{b}})", unsigned(kind))

    def op_add(self, i: Instruction) -> None:
        if i.op[-1] == "f32" and "rz" in i.op:
            self.binary(i, "round_toward_zero(np.add({a}, {b}, dtype=f64))")
        else:
            self._ring(i, "+")

    def op_sub(self, i: Instruction) -> None:
        self._ring(i, "-")

    def op_mul(self, i: Instruction) -> None:
        kind = i.op[-1]
        if "wide" in i.op:
            a, b = self.read(i.args[1], kind), self.read(i.args[2], kind)
            wide = alias(_WIDE[kind])
            self.write(i.args[0], f"({a}.astype({wide}) * {b}.astype({wide}))", _WIDE[kind], i)
        elif "hi" in i.op:
            self.binary(i, "mul_hi({a}, {b})")
        else:
            self._ring(i, "*")

    def op_mad(self, i: Instruction) -> None:
        kind = i.op[-1]
        if kind in FLOATS:
            self.op_fma(i)
        elif "wide" in i.op:
            a, b, c = self.read(i.args[1], kind), self.read(i.args[2], kind), self.read(i.args[3], _WIDE[kind])
            wide = alias(_WIDE[kind])
            self.write(i.args[0], f"({a}.astype({wide}) * {b}.astype({wide}) + {c})", _WIDE[kind], i)
        elif "hi" in i.op:
            a, b, c = self.three(i, kind)
            self.write(i.args[0], f"(mul_hi({a}, {b}) + {c})", kind, i)
        else:
            kind = unsigned(kind)
            a, b, c = self.three(i, kind)
            self.write(i.args[0], f"({a} * {b} + {c})", kind, i)

    def op_fma(self, i: Instruction) -> None:
        kind = i.op[-1]
        if kind not in FLOATS or "rn" not in i.op:
            raise NotImplementedError(i.text)
        a, b, c = self.three(i, kind)
        if kind == "f64":
            result = f"({a} * {b} + {c})"  # rounded twice
        elif "ftz" in i.op:
            result = f"ftz(fma32(ftz({a}), ftz({b}), ftz({c})))"
        else:
            result = f"fma32({a}, {b}, {c})"
        self.write(i.args[0], result, kind, i)

    def op_div(self, i: Instruction) -> None:
        if i.op[-1] in FLOATS:
            self._float(i, "({a} / {b})" if "rn" in i.op else "approximate({a} / {b}, {a})")
        else:
            self.binary(i, f"quotient({{a}}, {{b}}, batch, {i.line})")

    def op_rem(self, i: Instruction) -> None:
        self.binary(i, f"remainder({{a}}, {{b}}, batch, {i.line})")

    def _unary(self, i: Instruction, template: str, kind: str | None = None, result: str | None = None) -> None:
        kind = kind or i.op[-1]
        self.write(i.args[0], template.format(a=self.read(i.args[1], kind)), result or kind, i)

    def _rounded(self, i: Instruction, template: str) -> None:
        self._unary(i, template if "rn" in i.op else f"approximate({template}, {{a}})")

    def op_rcp(self, i: Instruction) -> None:
        self._rounded(i, f"({alias(i.op[-1])}(1) / {{a}})")

    def op_sqrt(self, i: Instruction) -> None:
        self._rounded(i, "np.sqrt({a})")

    def op_rsqrt(self, i: Instruction) -> None:
        self._rounded(i, f"(1 / np.sqrt({{a}}.astype(f64))).astype({alias(i.op[-1])})")

    def op_ex2(self, i: Instruction) -> None:
        self._unary(i, f"ex2({{a}}, {'ftz' in i.op})", "f32")

    def op_lg2(self, i: Instruction) -> None:
        self._unary(i, f"lg2({{a}}, {'ftz' in i.op})", "f32")

    def _extreme(self, i: Instruction, name: str) -> None:
        kind = i.op[-1]
        if kind not in FLOATS:
            self.binary(i, f"np.{name}imum({{a}}, {{b}})")
            return
        function = f"np.{name}imum" if "NaN" in i.op else f"np.f{name}"
        if len(i.args) == 4:
            a, b, c = self.three(i, kind)
            self.write(i.args[0], f"{function}({function}({a}, {b}), {c})", kind, i)
        else:
            self.binary(i, f"{function}({{a}}, {{b}})")

    def op_max(self, i: Instruction) -> None:
        self._extreme(i, "max")

    def op_min(self, i: Instruction) -> None:
        self._extreme(i, "min")

    # ---- bits

    def _bits(self, i: Instruction, symbol: str) -> None:
        self.binary(i, f"({{a}} {symbol} {{b}})", self.bits_kind(i.op[-1]))

    def op_and(self, i: Instruction) -> None:
        self._bits(i, "&")

    def op_or(self, i: Instruction) -> None:
        self._bits(i, "|")

    def op_xor(self, i: Instruction) -> None:
        self._bits(i, "^")

    def op_not(self, i: Instruction) -> None:
        self._unary(i, "(~{a})", self.bits_kind(i.op[-1]))

    def op_neg(self, i: Instruction) -> None:
        self._unary(i, "(-{a})")

    def op_abs(self, i: Instruction) -> None:
        self._unary(i, "np.abs({a})")

    def _shift(self, i: Instruction, kind: str, symbol: str, function: str) -> None:
        a, amount = self.read(i.args[1], kind), i.args[2]
        if amount.tag == "int" and amount.value < 8 * SIZE[kind]:
            result = f"({a} {symbol} {self.constant(kind, amount.value)})"
        else:
            result = f"{function}({a}, {self.read(amount, 'u32')})"
        self.write(i.args[0], result, kind, i)

    def op_shl(self, i: Instruction) -> None:
        self._shift(i, unsigned(i.op[-1]), "<<", "shift_left")

    def op_shr(self, i: Instruction) -> None:
        kind = i.op[-1]
        self._shift(i, kind if kind[0] == "s" else unsigned(kind), ">>", "shift_right")

    def op_popc(self, i: Instruction) -> None:
        self._unary(i, "np.bitwise_count({a}).astype(u32)", unsigned(i.op[-1]), "u32")

    def op_clz(self, i: Instruction) -> None:
        if SIZE[i.op[-1]] != 4:
            raise NotImplementedError(i.text)
        self._unary(i, "clz({a})", "u32")

    def op_bfe(self, i: Instruction) -> None:
        kind = i.op[-1]
        a, start, length = (self.read(operand, k) for operand, k in zip(i.args[1:], (kind, "u32", "u32"), strict=True))
        self.write(i.args[0], f"bfe({a}, {start}, {length}, {alias(kind)})", unsigned(kind), i)

    def op_bfi(self, i: Instruction) -> None:
        if SIZE[i.op[-1]] != 4:
            raise NotImplementedError(i.text)
        operands = ", ".join(self.read(operand, "u32") for operand in i.args[1:5])
        self.write(i.args[0], f"bfi({operands})", "u32", i)

    def op_prmt(self, i: Instruction) -> None:
        if i.op[-1] != "b32":
            raise NotImplementedError(i.text)
        self.write(i.args[0], f"prmt({', '.join(self.three(i, 'u32'))})", "u32", i)

    def op_lop3(self, i: Instruction) -> None:
        self.write(i.args[0], f"lop3({', '.join(self.three(i, 'u32'))}, {i.args[4].value})", "u32", i)

    def op_shf(self, i: Instruction) -> None:
        operands = ", ".join(self.three(i, "u32"))
        self.write(i.args[0], f"funnel_shift({operands}, {'l' in i.op}, {'wrap' in i.op})", "u32", i)

    # ---- comparisons

    def op_selp(self, i: Instruction) -> None:
        kind = i.op[-1] if i.op[-1] in FLOATS else unsigned(i.op[-1])
        a, b = self.read(i.args[1], kind), self.read(i.args[2], kind)
        self.write(i.args[0], f"np.where({self.read(i.args[3], 'pred')}, {a}, {b})", kind, i)

    def op_setp(self, i: Instruction) -> None:
        comparison, kind = i.op[1], i.op[-1]
        if comparison in _UNSIGNED_COMPARISONS:
            comparison, kind = _UNSIGNED_COMPARISONS[comparison], unsigned(kind)
        elif kind[0] not in "sf":
            kind = unsigned(kind)
        a, b = self.read(i.args[1], kind), self.read(i.args[2], kind)
        if kind in ("f16", "bf16"):
            widen = "from_half" if kind == "f16" else "from_brain"
            a, b, kind = f"{widen}({a})", f"{widen}({b})", "f32"
        if kind not in FLOATS:
            result = f"({a} {_SYMBOLS[comparison]} {b})"
        elif comparison == "ne":
            result = f"(({a} != {b}) & ({a} == {a}) & ({b} == {b}))"
        elif comparison in _SYMBOLS:
            result = f"({a} {_SYMBOLS[comparison]} {b})"
        elif comparison == "num":
            result = f"(({a} == {a}) & ({b} == {b}))"
        elif comparison == "nan":
            result = f"(({a} != {a}) | ({b} != {b}))"
        elif comparison == "equ":
            result = f"(({a} == {b}) | ({a} != {a}) | ({b} != {b}))"
        else:
            result = f"(~({a} {_OPPOSITES[comparison]} {b}))"
        if i.op[2] in ("and", "or", "xor"):
            symbol = {"and": "&", "or": "|", "xor": "^"}[i.op[2]]
            result = f"({result} {symbol} {self.read(i.args[3], 'pred')})"
        self.write(i.args[0], result, "pred", i)

    # ---- moves and conversions

    def op_mov(self, i: Instruction) -> None:
        kind, to, source = i.op[-1], i.args[0], i.args[1]
        whole = f"u{8 * SIZE[kind]}"
        if to.tag == "vec":
            bits = SIZE[kind] * 8 // len(to.value)
            value = self.temporary(self.read(source, whole))
            for n, part in enumerate(to.value):
                if part.tag != "sink":
                    shifted = f"({value} >> {self.constant(whole, n * bits)})"
                    self.write(part, f"{shifted}.astype(u{bits})", f"u{bits}", i)
        elif source.tag == "vec":
            bits = SIZE[kind] * 8 // len(source.value)
            parts = [
                f"({self.read(part, f'u{bits}')}.astype({whole}) << {whole}({n * bits}))"
                for n, part in enumerate(source.value)
            ]
            self.write(to, "(" + " | ".join(parts) + ")", whole, i)
        else:
            value = self.read(source, kind)
            self.write(to, f"{value}.copy()" if source.tag == "reg" else value, kind, i)

    def op_cvt(self, i: Instruction) -> None:
        to, source = i.op[-2], i.op[-1]
        if to in ("f16x2", "bf16x2"):
            convert = "to_half" if to == "f16x2" else "to_brain"
            high, low = self.read(i.args[1], "f32"), self.read(i.args[2], "f32")
            self._check_rounding(i)
            self.write(i.args[0], f"pack16({convert}({low}), {convert}({high}))", "u32", i)
            return
        if to == "tf32":
            if i.op[1:] != ["rna", "tf32", "f32"]:
                raise NotImplementedError(i.text)
            self.write(i.args[0], f"to_tf32({self.read(i.args[1], 'f32')})", "u32", i)
            return
        value = self.read(i.args[1], source)
        if source in ("f16", "bf16"):
            value = f"{'from_half' if source == 'f16' else 'from_brain'}({value})"
            source = "f32"
        self.write(i.args[0], self._converted(i, value, source, to), to, i)

    def _converted(self, i: Instruction, value: str, source: str, to: str) -> str:
        mode = next((part for part in i.op if part in _ROUNDINGS), None)
        if to in ("f16", "bf16"):
            self._check_rounding(i)
            value = value if source in FLOATS else f"{value}.astype(f32)"
            return f"{'to_half' if to == 'f16' else 'to_brain'}({value})"
        if source in FLOATS and to in FLOATS:
            if "rz" in i.op and source == "f64":
                result = f"round_toward_zero({value})"
            else:
                self._check_rounding(i)
                result = f"{value if mode is None else f'round_to_integer({value}, {mode!r})'}.astype({alias(to)})"
            return f"np.fmin(np.fmax({result}, {alias(to)}(0)), {alias(to)}(1))" if "sat" in i.op else result
        if source in FLOATS:
            return f"float_to_int({value}, {alias(to)}, {mode!r})"
        if "sat" in i.op:
            raise NotImplementedError(i.text)
        return f"{value}.astype({alias(to)})"

    @staticmethod
    def _check_rounding(i: Instruction) -> None:
        """To the nearest, ties to even, is the only one that there is here."""
        if any(mode in i.op for mode in ("rz", "rm", "rp", "rna", "relu")):
            raise NotImplementedError(i.text)
