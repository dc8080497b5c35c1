"""What the Triton kernels of the expert losses share: where the logits are, how many a program takes, sums over rows.

Forward kernels run one program a row (a sample, or a sample and an expert) that streams the classes once, in blocks,
and keeps its sums of exponentials relative to running maxima, the pivots; ``batch_sum`` then adds the rows' terms in a
fixed order. Backward kernels run one program a row and block of classes, element-wise. A few floats a row, saved,
pass from forward to backward. Everything is computed in float32 and only the finished gradient is rounded. The kernels
use portable Triton only, so they run on every GPU that Triton targets, and on CPU tensors in its interpreter.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Specialising on the values of these would compile a kernel for every combination of them; the kernels are told what
# they need to know by ALIGN, and by a class stride of None for 1.
UNSPECIALIZED = [
    *("offsets", "row_stride", "class_stride", "target_stride", "bias_expert_stride", "bias_class_stride"),
    *("out_expert_stride", "out_row_stride", "out_class_stride", "classes", "rows"),
]


# Added to each offset that a kernel is given, so that it is an int64 whatever its value: Triton compiles a kernel anew
# where the type of an argument changes, and tensors of one loss lie more or less than 2³¹ elements apart by chance.
FAR = tl.constexpr(2**62)


@triton.jit
def expert_offset(offsets, k: tl.constexpr):
    return offsets[k] - FAR


@triton.jit
def class_offset(c, class_stride):
    """The offset of class c. A stride of None is 1 at compile time: neighbouring classes then make one wide load."""
    return c if class_stride is None else c.to(tl.int64) * class_stride


@triton.jit
def exp(x):
    """exp(x), results below 1.2e-38 flushed to 0; tl.exp takes three more instructions to keep those."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def times_factor(weight, factors, i):
    """weight · factors[i], in float32; factors may be None, at compile time."""
    return weight if factors is None else weight * tl.load(factors + i).to(tl.float32)


@triton.jit
def reduced(blocks, MAX: tl.constexpr):  # n tensors [BLOCK] -> n scalars
    """The maxima or sums of several blocks in one reduction, which pays for its barriers once instead of n times."""
    count: tl.constexpr = len(blocks)
    levels: tl.constexpr = (count > 1) + (count > 2) + (count > 4) + (count > 8) + (count > 16)
    joined = blocks
    for _ in tl.static_range(2**levels - count):
        joined += (tl.full(blocks[0].shape, 0.0, tl.float32),)
    for _ in tl.static_range(levels):
        pairs = ()
        for i in tl.static_range(len(joined) // 2):
            pairs += (tl.join(joined[2 * i], joined[2 * i + 1]),)
        joined = pairs
    results = (tl.max(joined[0], 0) if MAX else tl.sum(joined[0], 0),)
    for _ in tl.static_range(levels):
        halves = ()
        for i in tl.static_range(len(results)):
            low, high = tl.split(results[i])
            halves += (low, high)
        results = halves
    return results  # the first n; the padding follows


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _batch_kernel(
    row_terms,  # float32 [rows, TERMS]
    loss,  # float32 []
    terms,  # float32 [TERMS]; the loss is their sum
    factors,  # float64 [TERMS - 1] or None
    rows: tl.int64,
    scale_0,  # the divisor and weight of each term
    scale_1,
    scale_2,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Add the terms of all rows: one program, so that the order and with it the result never changes."""
    lanes = ()
    for _ in tl.static_range(TERMS):
        lanes += (tl.full([BLOCK], 0.0, tl.float32),)
    b = tl.arange(0, BLOCK).to(tl.int64)
    for _ in range(0, BLOCKS):
        added = ()
        for i in tl.static_range(TERMS):
            added += (lanes[i] + tl.load(row_terms + b * TERMS + i, mask=b < rows, other=0.0),)
        lanes = added
        b += BLOCK
    sums = reduced(lanes, False)
    scales = (scale_0, times_factor(scale_1, factors, 0), times_factor(scale_2, factors, 1))
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(TERMS):
        term = scales[i] * sums[i]
        tl.store(terms + i, term)
        total += term
    tl.store(loss, total)


def batch_sum(
    row_terms: Tensor, scales: tuple[float, float, float], factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reduce the row terms [rows, T] to the loss [] and its terms [T], scaled.

    ``factors``, if given, multiply the scales of the second and the third term.
    """
    rows, count = row_terms.shape
    loss, terms = row_terms.new_empty(()), row_terms.new_empty(count)  # two tensors: outputs of an op must not alias
    block = min(max(triton.next_power_of_2(rows), 128), 4096)
    _batch_kernel[(1,)](
        row_terms,
        loss,
        terms,
        factors,
        rows,
        *scales,
        TERMS=count,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(triton.cdiv(rows, block)),  # few values, to compile for few batch sizes
        num_warps=max(block // 512, 1),
    )
    return loss, terms


# Logits a thread may hold at once, as float32. A forward program reduces over its block several times, so it pays to
# hold many: 32 fit K ≤ 4 in 128 registers, which lets two blocks of 256 threads share a multiprocessor of 65,536 and
# hide each other's loads and barriers. A backward program has nothing to share but what is saved of its row: half as
# many, for more threads.
FORWARD_BUDGET = 32
BACKWARD_BUDGET = 16


class Tile(NamedTuple):
    block: int  # classes a program takes at once, a power of two
    warps: int


def choose_tile(classes: int, experts: int, itemsize: int, budget: int) -> Tile:
    """Choose how many classes, of ``experts`` logits of ``itemsize`` bytes each, a program takes at once.

    A thread takes as many as its budget of logits allows, a power of two; but no more than ``budget`` bytes an expert,
    one or two of the widest loads (16 bytes). Longer rows get more warps, up to 8, and then a loop (forward) or more
    programs (backward). A forward row in one block needs no rescaling.
    """
    per_thread = min(1 << ((budget // experts).bit_length() - 1), budget // itemsize)
    block = min(max(triton.next_power_of_2(classes), 32), 256 * per_thread)
    return Tile(block, max(block // (32 * per_thread), 1))


class Layout(NamedTuple):
    """Where z_k[b, c] is: ``offsets[k] + b * row_stride + c * class_stride`` elements from the first pointer."""

    first: Tensor
    offsets: tuple[int, ...]
    row_stride: int
    class_stride: int
    batch: int
    classes: int

    @property
    def experts(self) -> int:
        return len(self.offsets)

    def arguments(self, target: Tensor) -> tuple[Any, ...]:
        """What every kernel's parameters begin with: logits and target, and how to address them."""
        strides = (self.row_stride, none_if_unit(self.class_stride), target.stride(0))
        return self.first, target, tuple(offset + FAR.value for offset in self.offsets), *strides, self.classes

    def alignment(self, *strides: int) -> int:
        """The largest power of two up to 16 that divides every offset, stride and the number of classes."""
        return math.gcd(16, self.classes, self.row_stride, *self.offsets, *strides)

    def tile(self, experts: int, budget: int) -> Tile:
        """The tile of a program that takes the logits of ``experts`` experts."""
        return choose_tile(self.classes, experts, self.first.element_size(), budget)

    def new_floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.first.device)

    def new_gradient(self) -> Tensor:
        """Uninitialised memory [K, B, C]: laid out as one tensor of logits, contiguous for a sequence."""
        if self.first.dim() == 3:
            return torch.empty_like(self.first)
        return self.first.new_empty(self.experts, self.batch, self.classes)


def layout_of(logits: Sequence[Tensor]) -> Layout:
    """The layout of one tensor [K, B, C] or of K tensors [B, C]."""
    first = logits[0]
    *_, batch, classes = first.shape
    *expert_strides, row_stride, class_stride = first.stride()
    if expert_strides:
        offsets = tuple(k * expert_strides[0] for k in range(first.shape[0]))
    else:
        distances = [expert.data_ptr() - first.data_ptr() for expert in logits]  # bytes
        itemsize = first.element_size()
        if any(expert.stride() != first.stride() for expert in logits) or any(d % itemsize for d in distances):
            # The kernels address all experts from one pointer with one pair of strides. Experts that were laid out
            # differently, or whose distance in memory is not a whole number of elements, are copied; both are rare.
            return layout_of([torch.stack(tuple(logits))])
        offsets = tuple(distance // itemsize for distance in distances)
    return Layout(first, offsets, row_stride, class_stride, batch, classes)


def gradient_arguments(gradient: Tensor) -> tuple[Any, ...]:
    """A gradient [K, B, C] and its strides, as the backward kernels take them."""
    return gradient, gradient.stride(0), gradient.stride(1), none_if_unit(gradient.stride(2))


def none_if_unit(class_stride: int) -> int | None:
    return None if class_stride == 1 else class_stride
