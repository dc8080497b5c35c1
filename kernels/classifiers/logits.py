"""Logits of K linear or cosine classifiers, z = x W + b or z = s x̂ Ŵ, and their gradients.

One kernel computes the three matrix products, on tensor cores, each float32 factor as the sum of two TF32 numbers. What
normalises the vectors is multiplied into a tile of a factor when it is read, or into a tile of the product before it is
written. A library's product would need copies of the weight, split, and two bfloat16 numbers for each float32 one would
leave errors of 2⁻¹⁶.

With r = s / max(|x|, ε) and c = 1 / max(|w|, ε), one number a row and one a column, and g the logits' gradient:

    z  = r (x W) c
    dx = r ( (g c) Wᵀ − x · r/s² Σ_c g z )
    dW = ( (r x)ᵀ g − W · c Σ_b g z ) c

A sum is absent where the norm is below ε. Both come from one reading of g and of a copy of z, for z may be changed in
place. Σ_b g z is also the product of w and its gradient without that term; but they are larger as soon as the batch is
smaller than D, and the gradient would be written twice.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple

# Rows, columns and depth that a program takes of a product. Small, for the products are: 64 samples of 2048 features
# make 96 tiles. And three programs fit a multiprocessor, so that one multiplies while another loads.
TILE = (64, 64, 32)
DOTS_TILE = (32, 128)
WARPS = 4
_GROUP = tl.constexpr(8)
_TENSOR_CORES = torch.version.hip is None  # AMD's multiply float32 itself as fast as three products of less


@triton.jit
def _scaled(x, scale, at, inside, AXIS: tl.constexpr):
    """x times a vector along an axis of the tile; None: x."""
    return x if scale is None else x * tl.expand_dims(tl.load(scale + at, mask=inside, other=0.0), AXIS)


@triton.jit(do_not_specialize=["rows", "columns", "depth"])
def _product_kernel(
    a,  # [K, rows, depth], or [K, depth, rows] if A_TRANSPOSED; all tensors are contiguous float32
    b,  # [K, depth, columns], or [K, columns, depth] if B_TRANSPOSED
    out,  # [K, rows, columns] = (a · depth_scale) b − subtracted · shares, times row_scale and column_scale, + bias
    copy,  # the same, once more
    depth_scale,  # [K, depth]
    row_scale,  # [K, rows]
    column_scale,  # [K, columns]
    subtracted,  # [K, rows, columns]
    row_share,  # [K, rows]
    column_share,  # [K, columns]
    bias,  # [K, columns]; each of these may be None
    rows,
    columns,
    depth,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    ROWS_ALIGN: tl.constexpr,
    COLUMNS_ALIGN: tl.constexpr,
    DEPTH_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows, columns, depth = multiple(rows, ROWS_ALIGN), multiple(columns, COLUMNS_ALIGN), multiple(depth, DEPTH_ALIGN)
    # Tiles of one column follow each other, eight rows at most: they share what they read of b in the cache.
    tile, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    first = tile // (_GROUP * across) * _GROUP
    grouped = tl.minimum(tl.cdiv(rows, ROWS) - first, _GROUP)
    within = tile % (_GROUP * across)
    m = (first + within % grouped) * ROWS + tl.arange(0, ROWS)
    n = within // grouped * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, DEPTH)
    a += expert * rows * depth
    b += expert * depth * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        d = start + i
        if A_TRANSPOSED:
            a_at = d.to(tl.int64)[None, :] * rows + m[:, None]
        else:
            a_at = m.to(tl.int64)[:, None] * depth + d[None, :]
        if B_TRANSPOSED:
            b_at = n.to(tl.int64)[None, :] * depth + d[:, None]
        else:
            b_at = d.to(tl.int64)[:, None] * columns + n[None, :]
        x = tl.load(a + a_at, mask=(m[:, None] < rows) & (d[None, :] < depth), other=0.0)
        y = tl.load(b + b_at, mask=(d[:, None] < depth) & (n[None, :] < columns), other=0.0)
        x = _scaled(x, depth_scale, expert * depth + d, d < depth, 0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    at = (expert * rows + m)[:, None] * columns + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    if subtracted is not None:
        share = tl.load(subtracted + at, mask=inside, other=0.0)
        share = _scaled(share, row_share, expert * rows + m, m < rows, 1)
        total -= _scaled(share, column_share, expert * columns + n, n < columns, 0)
    total = _scaled(total, row_scale, expert * rows + m, m < rows, 1)
    total = _scaled(total, column_scale, expert * columns + n, n < columns, 0)
    if bias is not None:
        total += tl.load(bias + expert * columns + n, mask=n < columns, other=0.0)[None, :]
    tl.store(out + at, total, mask=inside)
    if copy is not None:
        tl.store(copy + at, total, mask=inside)


@triton.jit(do_not_specialize=["batch", "classes"])
def _dots_kernel(
    g,  # [K, batch, classes]
    z,  # likewise
    of_rows,  # [K, blocks of classes, batch]: the part of Σ_c g z of this block
    of_columns,  # [K, classes]: Σ_b g z
    batch,
    classes,
    CLASSES_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    classes = multiple(classes, CLASSES_ALIGN)
    block, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, batch, ROWS):
        b = start + tl.arange(0, ROWS)
        at = (expert * batch + b)[:, None] * classes + c[None, :]
        inside = (b[:, None] < batch) & (c[None, :] < classes)
        product = tl.load(g + at, mask=inside, other=0.0) * tl.load(z + at, mask=inside, other=0.0)
        tl.store(of_rows + (expert * tl.num_programs(0) + block) * batch + b, tl.sum(product, 1), mask=b < batch)
        total += product
    tl.store(of_columns + expert * classes + c, tl.sum(total, 0), mask=c < classes)


def _product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    precision: str,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    copy: Tensor | None = None,
    depth_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    subtracted: Tensor | None = None,
    row_share: Tensor | None = None,
    column_share: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Launch the kernel, whose arguments these are."""
    experts, rows, columns = out.shape
    depth = a.shape[1 if a_transposed else 2]
    if out.numel() == 0:
        return
    row_tile, column_tile, depth_tile = TILE
    grid = triton.cdiv(rows, row_tile) * triton.cdiv(columns, column_tile), experts
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _product_kernel[grid](
            *(a, b, out, copy, depth_scale, row_scale, column_scale, subtracted, row_share, column_share, bias),
            *(rows, columns, depth),
            A_TRANSPOSED=a_transposed,
            B_TRANSPOSED=b_transposed,
            # Of neighbours in memory. The batch never is one, so that its size compiles nothing anew.
            ROWS_ALIGN=_alignment(rows) if a_transposed else 1,
            COLUMNS_ALIGN=_alignment(columns),
            DEPTH_ALIGN=1 if a_transposed else _alignment(depth),
            PRECISION=_input_precision(precision),
            ROWS=row_tile,
            COLUMNS=column_tile,
            DEPTH=depth_tile,
            num_warps=WARPS,
        )


def _alignment(count: int) -> int:
    return math.gcd(4, count)


def _input_precision(precision: str) -> str:
    """Of Triton's dot, for a precision in PyTorch's words."""
    if not _TENSOR_CORES:
        return "ieee"
    return "tf32x3" if precision == "highest" else "tf32"


def _dots(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_c g z [K, B] and Σ_b g z [K, C], in a fixed order."""
    experts, batch, classes = g.shape
    rows, columns = DOTS_TILE
    blocks = triton.cdiv(classes, columns)
    of_rows, of_columns = g.new_empty(experts, blocks, batch), g.new_empty(experts, classes)
    with torch.cuda.device_of(g):
        _dots_kernel[blocks, experts](
            *(g, z, of_rows, of_columns, batch, classes),
            CLASSES_ALIGN=_alignment(classes),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            # Lanes add to their own product that of another one: unrounded in one of them, the two sums would differ.
            enable_fp_fusion=False,
        )
    return of_rows.sum(1), of_columns


def logits_forward(
    features: Tensor,  # float32 [K, B, D], contiguous, as all of these
    weight: Tensor,  # [K, D, C]
    bias: Tensor | None,  # [K, C]
    scale: float | None,  # s; None: x W + b
    eps: float,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits [K, B, C], the norms [K, B] and [K, C], and to ``keep`` the logits again, which nobody will change.

    What is not needed is empty.
    """
    z = features.new_empty(*features.shape[:2], weight.shape[2])
    if scale is None:
        _product(features, weight, z, precision, bias=bias)
        return z, z.new_empty(0), z.new_empty(0), z.new_empty(0)
    norms = torch.linalg.vector_norm(features, dim=2), torch.linalg.vector_norm(weight, dim=1)
    r, c = _scales(*norms, scale, eps)
    kept = torch.empty_like(z) if keep else z.new_empty(0)
    # Written twice to one place where nothing is kept: a separate kernel would first be compiled where the first call
    # without gradients is, perhaps in a graph that is being captured.
    _product(features, weight, z, precision, copy=kept if keep else z, row_scale=r, column_scale=c)
    return z, *norms, kept


def logits_backward(
    g: Tensor,  # float32 [K, B, C], contiguous
    features: Tensor,
    weight: Tensor,
    norms: tuple[Tensor, Tensor],
    kept: Tensor,
    scale: float | None,
    eps: float,
    precision: str,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of features and weight; one that is not wanted is empty."""
    r = c = x = w = row_share = column_share = None
    if scale is not None:
        r, c = _scales(*norms, scale, eps)
        x, w = features, weight
        of_rows, of_columns = _dots(g, kept)
        row_share = torch.where(norms[0] >= eps, of_rows * r / scale**2, 0.0)
        column_share = torch.where(norms[1] >= eps, of_columns * c, 0.0)
    dx, dw = g.new_empty(0), g.new_empty(0)
    if wanted[0]:
        dx = torch.empty_like(features)
        _product(
            *(g, weight, dx, precision),
            b_transposed=True,
            depth_scale=c,
            row_scale=r,
            subtracted=x,
            row_share=row_share,
        )
    if wanted[1]:
        dw = torch.empty_like(weight)
        _product(
            *(features, g, dw, precision),
            a_transposed=True,
            depth_scale=r,
            column_scale=c,
            subtracted=w,
            column_share=column_share,
        )
    return dx, dw


def _scales(features_norm: Tensor, weight_norm: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """r and c."""
    return scale / features_norm.clamp_min(eps), weight_norm.clamp_min(eps).reciprocal()
