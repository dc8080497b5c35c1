"""Cases of depth-wise knowledge fusion: maps, their layouts, norms, and the comparison with the float64 reference.

A host of the interpreter gives ``place``: a tensor of values, strides and offset beside which nothing is allocated.
"""

from random import Random
from typing import NamedTuple

import torch
from loss_inputs import OnDevice, Place
from outcomes import BOUND, DTYPES, LOCKSTEP, Outcome, error
from torch import Tensor

from shike_fast import ops

LAYOUTS = (
    *("last", "first", "last, unaligned", "first, unaligned", "channels of a wider map", "window", "last, window"),
    *("batch inside", "height inside", "one sample", "one channel", "one position"),
)
VALUES = ("normal", "normal", "shifted", "constant", "large")
FAR = "far"  # normalised maps have a mean of 10^4, where eager PyTorch loses four digits
OPS = ("pool", "bn", "experts", "folded")
SIZES = ((1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (7, 7), (8, 8), (14, 14))
CHANNELS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 40, 64, 100, 256)


class FusionCase(NamedTuple):
    op: str
    experts: int
    shape: tuple[int, int, int, int]  # B, C, H, W
    dtype: str
    layouts: tuple[str, ...]  # one for all maps, or some to choose from
    training: bool
    values: str
    processors: int = 132  # of the device, where the host can choose
    orders: tuple[str, ...] = ()  # beside the usual one
    seed: int = 0


class Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class Setting(NamedTuple):
    """What a case draws."""

    values: list[list[Tensor]]  # deep, shallow and, folded, shortcut: K maps each
    maps: list[list[Tensor]]  # the same in their layouts
    norms: list[Norm]
    relu: list[bool]
    momentum: float
    eps: float
    grad_output: Tensor  # [K, B, C], or [B, C] for one expert


def laid_out(values: Tensor, layout: str, random: Random, place: Place) -> tuple[Tensor, Tensor]:
    """A map in a layout, and its values in float64."""
    batch, channels, height, width = values.shape
    some, plane = random.randrange, height * width
    if layout.startswith("one "):  # for all
        dims = {"one sample": (0,), "one channel": (1,), "one position": (2, 3)}[layout]
        few = values[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(4))].contiguous()
        return place(few, few.stride(), 0).expand(values.shape), few.expand(values.shape)
    wider, rows, columns = channels + 1 + some(16), height + 1 + some(2), width + 1 + some(2)
    strides, offset = {
        "last": ((channels * plane, 1, width * channels, channels), 0),
        "first": ((channels * plane, plane, width, 1), 0),
        "last, unaligned": ((channels * plane, 1, width * channels, channels), 1 + some(7)),
        "first, unaligned": ((channels * plane, plane, width, 1), 1 + some(7)),
        "channels of a wider map": ((wider * plane, 1, width * wider, wider), some(wider - channels + 1)),
        "window": ((channels * rows * columns, rows * columns, columns, 1), some(3)),
        "last, window": ((channels * rows * columns, 1, columns * channels, channels), 0),
        "batch inside": ((1, batch, channels * width * batch, channels * batch), 0),
        "height inside": ((channels * plane, plane, 1, height), 0),
    }[layout]
    return place(values, strides, offset), values


def setting_of(case: FusionCase, random: Random, place: Place) -> Setting:
    channels, dtype, experts = case.shape[1], DTYPES[case.dtype], case.experts

    def values(normed: bool) -> Tensor:
        drawn = torch.randn(case.shape)
        if case.values == FAR:
            drawn = drawn + (1e4 if normed else 0)
        elif case.values == "shifted":
            drawn = drawn + torch.randn(channels).view(1, -1, 1, 1) * (100 if case.dtype == "f32" else 8)
        elif case.values == "constant":  # every other channel
            same = torch.randn(1, channels, 1, 1).expand(case.shape)
            drawn = same + (torch.arange(channels) % 2).view(1, -1, 1, 1) * drawn
        elif case.values == "large":
            drawn = drawn * (30 if case.dtype == "f16" else 1e3)
        return drawn.to(dtype)

    normed = {"pool": (False, False), "folded": (True, True, False)}.get(case.op, (False, True))
    both = [[laid_out(values(n), random.choice(case.layouts), random, place) for _ in range(experts)] for n in normed]
    # What is constant, as two values may be, is normalised to rounding errors: alone they decide on a ReLU and on f.
    # Far away many values are the running mean, and x·scale + shift is not quite 0 there.
    batch, plane = case.shape[0], case.shape[2] * case.shape[3]
    fewest = min({"one sample": plane, "one position": batch}.get(layout, batch * plane) for layout in case.layouts)
    certain = case.values in ("constant", FAR) or fewest <= 2
    affine = "both" if certain else random.choice(["both", "both", "both", "none", "weight"])
    tracked = not case.training or random.random() < 0.8
    norms = [
        Norm(
            torch.randn(channels) if affine != "none" else None,
            torch.randn(channels) * 0.5 if affine == "both" else None,
            torch.randn(channels) + (1e4 if case.values == FAR else 0) if tracked else None,
            torch.rand(channels) + 0.2 if tracked else None,
        )
        for _ in range({"pool": 0, "bn": 1, "experts": experts, "folded": 2 * experts}[case.op])
    ]
    lead = () if case.op in ("pool", "bn") else (experts,)
    grad_output = (torch.randn(*lead, *case.shape[:2]) * random.choice([1.0, 1.0, 3.0])).to(dtype)
    return Setting(
        [[exact for _, exact in group] for group in both],
        [[map_ for map_, _ in group] for group in both],
        norms,
        [random.random() < 0.5 for _ in range(experts)],
        random.choice([0.1, 1.0, 0.03]),
        random.choice([1e-5, 1e-3]),
        grad_output,
    )


def evaluate(
    case: FusionCase, setting: Setting, maps: list[list[Tensor]], backend: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """f, the gradients of all leaves, and the running statistics; in ``dtype``, or as the tensors are."""
    experts = case.experts
    leaves = [[(m if dtype is None else m.to(dtype)).detach().requires_grad_() for m in group] for group in maps]
    norms = [Norm(*(None if v is None else v.to(dtype or v.dtype, copy=True) for v in norm)) for norm in setting.norms]
    vectors = {}
    for i, norm in enumerate(norms):
        for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
            if vector is not None:
                vectors[f"{name} {i}"] = vector.requires_grad_()
    arguments = [ops.BatchNormArguments(*norm, case.training, setting.momentum, setting.eps) for norm in norms]
    deep, shallow = leaves[0], leaves[1]
    if case.op == "pool":
        f = ops.dkf_pool(deep[0], shallow[0], backend=backend)
    elif case.op == "bn":
        options = {"training": case.training, "momentum": setting.momentum, "eps": setting.eps, "relu": setting.relu[0]}
        f = ops.dkf_bn_pool(deep[0], shallow[0], *norms[0], **options, backend=backend)
    else:
        folded = {"shortcut": leaves[2], "deep_norms": arguments[experts:]} if case.op == "folded" else {}
        f = ops.dkf_experts(deep, shallow, arguments[:experts], relu=setting.relu, **folded, backend=backend)
    names = ("deep", "shallow", "shortcut")
    inputs = {f"{names[i]} {k}": map_ for i, group in enumerate(leaves) for k, map_ in enumerate(group)} | vectors
    gradients = torch.autograd.grad(f, [*inputs.values()], setting.grad_output.to(f.dtype))
    results = {"f": f.detach(), **dict(zip(inputs, gradients, strict=True))}
    for i, norm in enumerate(norms):
        if norm.running_mean is not None and norm.running_var is not None:
            results |= {f"mean {i}": norm.running_mean, f"variance {i}": norm.running_var}
    return results


def before_projection(case: FusionCase, setting: Setting) -> dict[str, Tensor]:
    """What the gradients through the norms would be if mean and variance were constants: the rest may cancel them."""
    normed = [*setting.values[1], *(setting.values[0] if case.op == "folded" else [])]
    norms = []
    for norm, values in zip(setting.norms, normed, strict=True):
        wide = values.double().transpose(0, 1).flatten(1)
        norms.append(norm._replace(running_mean=wide.mean(1), running_var=wide.var(1, correction=0)))
    fixed = setting._replace(norms=norms)
    return evaluate(case._replace(training=False), fixed, setting.values, "reference", torch.float64)


def check(outcome: Outcome, case: FusionCase, place: Place, on_device: OnDevice) -> Setting:
    """Against float64, and the same bits in other orders.

    No worse than some roundings, or four times the error of eager PyTorch in the same dtype.
    """
    random = Random(case.seed)
    torch.manual_seed(case.seed)
    setting = setting_of(case, random, place)

    def evaluated(backend: str) -> dict[str, Tensor]:
        return evaluate(case, setting, setting.maps, backend)

    mine = on_device(LOCKSTEP, evaluated)
    exact = evaluate(case, setting, setting.values, "reference", torch.float64)
    eager = evaluate(case, setting, setting.maps, "reference")
    terms = before_projection(case, setting) if case.training and case.op != "pool" else {}
    for name, expected in exact.items():
        kind = name.split()[0]
        scale = terms.get(name) if kind in ("deep", "shallow") else None
        vector = kind in ("weight", "bias") and case.dtype == "f32"
        bound = 1e-5 if vector or kind in ("mean", "variance") else BOUND[case.dtype]
        usual = 3e-5 if case.values == FAR else 4 * error(eager[name], expected, scale)
        wrong = error(mine[name], expected, scale)
        outcome.within(f"{kind}, {case.op}, {case.dtype}", wrong, max(bound, usual))
    for order in case.orders:
        again = on_device(order, evaluated)
        for name, result in mine.items():
            outcome.same(f"{name}, {order}", result, again[name])
    return setting
