"""What the forward and the backward kernel over the maps share: their first parameters, and the normalisation."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels.fusion._maps import (
    Group,
    Strides,
    bits,
    extent_of,
    packed,
    vector,
    vectors_or_none,
)
from shike_fast.ops._dkf_arguments import DkfArguments


@triton.jit
def load_norm(mean_rstd, number, weight, bias, i, c, in_c, channels):  # 5 x [C]
    """Leading part and rest of the mean, rstd, γ · rstd, and the offset in γ x̂ + β = (γ · rstd)(x − leading) + offset.

    The difference comes first, so that a large mean takes no digits from it; the rest of the mean is below a unit in
    the mean's last place and does no harm in the offset. A thread of a channels-last tile holds such vectors of eight
    channels all the time, and every one that the loop over the positions can do without is eight registers less.
    """
    at = mean_rstd + number.to(tl.int64) * 3 * channels + c
    mean = tl.load(at, mask=in_c, other=0.0)
    rest = tl.load(at + channels, mask=in_c, other=0.0)
    rstd = tl.load(at + 2 * channels, mask=in_c, other=0.0)
    slope = vector(weight, i, c, in_c, 1.0) * rstd
    return mean, rest, rstd, slope, vector(bias, i, c, in_c, 0.0) - slope * rest


@triton.jit
def relative(total, weights, mean_rstd, number, c, in_c, channels):  # [C]: Σ w x̂ from Σ w (x − leading) and Σ w
    at = mean_rstd + number.to(tl.int64) * 3 * channels + c
    rest = tl.load(at + channels, mask=in_c, other=0.0)
    return tl.load(at + 2 * channels, mask=in_c, other=0.0) * (total - rest * weights)


@triton.jit
def place(channels, BLOCK_C: tl.constexpr):  # of a program: which sample or part of one, and which channels
    blocks = tl.cdiv(channels, BLOCK_C)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


def pointers(group: Group, roles: Sequence[Sequence[Tensor]], strides: Sequence[Strides]) -> list[Any]:
    """The maps of each role and their strides, or None twice where the role, the last one, has no maps."""
    arguments: list[Any] = []
    for maps, shared in zip(roles, (*strides, None), strict=False):
        arguments += [group.pick(maps), shared] if maps else [None, None]
    return arguments


def expert_arguments(args: DkfArguments, group: Group) -> tuple[Any, ...]:
    """What the parameters of the kernels over maps begin with: the experts of a launch."""
    maps = pointers(group, (args.deep, args.shallow, args.shortcut), group.strides)
    vectors = []
    for norms in (slice(0, args.experts), slice(args.experts, None)):
        for values, default in ((args.weight[norms], 1.0), (args.bias[norms], 0.0)):
            vectors.append(vectors_or_none(group.pick(values), default) if values else None)
    return *maps, *vectors, packed(group.slots), bits(group.pick(args.relu)), *extent_of(args.deep[0])
