"""PTX's scalar types: the NumPy types that hold their bits, and how generated code calls those."""

import numpy as np

NUMPY = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.uint16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "pred": np.bool_,
}
SIZE = {kind: np.dtype(numpy_type).itemsize for kind, numpy_type in NUMPY.items()}
INTEGERS = {"u8": np.uint8, "i8": np.int8, "u16": np.uint16, "i16": np.int16, "u32": np.uint32, "i32": np.int32}
INTEGERS |= {"u64": np.uint64, "i64": np.int64}
ALIASES = INTEGERS | {"f32": np.float32, "f64": np.float64, "b1": np.bool_}  # in generated code
_ALIAS = {np.dtype(numpy_type): alias for alias, numpy_type in ALIASES.items()}


def alias(kind: str) -> str:
    """``f32`` for f32, ``i32`` for s32, ``u16`` for bf16: what generated code calls the NumPy type."""
    return _ALIAS[np.dtype(NUMPY[kind])]


def unsigned(kind: str) -> str:
    """The unsigned type of an integer's size: for operations whose low bits do not depend on the sign."""
    return f"u{8 * SIZE[kind]}" if kind[0] in "sub" and kind not in ("bf16", "bf16x2") else kind
