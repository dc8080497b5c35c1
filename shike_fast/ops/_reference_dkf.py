"""The stages of depth-wise knowledge fusion as PyTorch operators: the signatures of ``_native_dkf``, for every device.

Used where statistics are synchronised between processes and no fused kernels run.
"""

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._dkf_arguments import DkfArguments


def dkf_statistics(maps: list[Tensor]) -> Tensor:
    """Mean, nothing, and the sum of squared distances from the mean: [maps, 3, C]."""
    rows = []
    for map_ in maps:
        wide = map_.to(accumulation_dtype(map_.dtype))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        rows += [mean, torch.zeros_like(mean), var * (map_.numel() // map_.shape[1])]
    return torch.stack(rows).unflatten(0, (len(maps), 3))


def dkf_forward(
    args: DkfArguments, normalisers: Tensor, eps: list[float], running: list[Tensor], momentum: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [K, B, C] and the sums [K, S, B, C], for given normalisers."""
    pooled, sums = [], []
    for k in range(args.experts):
        distances, affine, shallow, deep, active = _branches(args, k, normalisers)
        weight = deep if not args.relu[k] else deep * (affine > 0)
        pooled.append((deep * shallow).mean((2, 3)))
        sums += [weight * distances[0], weight]
        if args.folded:
            sums += [shallow * active * distances[1], shallow * active]
    stacked = torch.stack([term.sum((2, 3)) for term in sums]).unflatten(0, (args.experts, args.sums))
    return torch.stack(pooled).to(args.deep[0].dtype), stacked, normalisers, args.new(0, 2, args.deep[0].shape[1])


def dkf_vector_gradients(args: DkfArguments, incoming: Tensor, sums: Tensor) -> Tensor:
    """Gradients of weights and biases [n, 2, C]."""
    height, width = args.deep[0].shape[2:]
    pairs = (incoming.to(sums.dtype).unsqueeze(1) * sums).sum(2) / (height * width)  # [K, S, C]
    return torch.cat([pairs[:, 0:2], pairs[:, 2:4]]) if args.folded else pairs


def dkf_map_gradients(
    args: DkfArguments, incoming: Tensor, normalisers: Tensor, vectors: Tensor, inverse_count: float
) -> list[Tensor]:
    """Gradients of the maps, in the order of ``args.maps``."""
    to_deep, to_shallow, to_shortcut = [], [], []
    height, width = args.deep[0].shape[2:]
    for k in range(args.experts):
        distances, affine, shallow, deep, active = _branches(args, k, normalisers)
        upstream = _column(incoming[k].to(deep.dtype) / (height * width), batched=True)

        def through_norm(gradient: Tensor, norm: int, x_hat: Tensor) -> Tensor:  # γ/σ · (gradient − dβ/N − x̂·dγ/N)
            weight = args.weight[norm]
            scale = normalisers[norm, 2] if weight is None else weight * normalisers[norm, 2]
            d_gamma, d_beta = (_column(vector * inverse_count) for vector in vectors[norm])
            return _column(scale) * (gradient - d_beta - x_hat * d_gamma)

        to_affine = upstream * deep * (affine > 0) if args.relu[k] else upstream * deep
        to_shallow.append(through_norm(to_affine, k, distances[0]))
        gradient = upstream * shallow
        if args.folded:
            gradient = gradient * active
            to_shortcut.append(gradient)
            gradient = through_norm(gradient, args.experts + k, distances[1])
        to_deep.append(gradient)
    gradients = [*to_deep, *to_shallow, *to_shortcut]
    return [gradient.to(map_.dtype) for gradient, map_ in zip(gradients, args.maps, strict=True)]


def _column(vector: Tensor, *, batched: bool = False) -> Tensor:
    """[C] or [B, C] over the positions."""
    return vector[:, :, None, None] if batched else vector[None, :, None, None]


def _branches(args: DkfArguments, k: int, normalisers: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The normalised maps (shallow, deep), γx̂ + β, the shallow and deep factors of the product, and whether the deep
    ReLU is active."""

    def normalised(x: Tensor, norm: int) -> tuple[Tensor, Tensor]:
        mean, rest, rstd = (_column(row) for row in normalisers[norm])
        x_hat = (x.to(mean.dtype) - mean - rest) * rstd
        weight, bias = args.weight[norm], args.bias[norm]
        scaled = x_hat if weight is None else x_hat * _column(weight)
        return x_hat, scaled if bias is None else scaled + _column(bias)

    x_hat, affine = normalised(args.shallow[k], k)
    shallow = affine.relu() if args.relu[k] else affine
    deep = args.deep[k].to(affine.dtype)
    distances, active = [x_hat], torch.ones_like(deep, dtype=torch.bool)
    if args.folded:
        y_hat, before = normalised(args.deep[k], args.experts + k)
        before = before + args.shortcut[k]
        distances, active, deep = [x_hat, y_hat], before > 0, before.relu()
    return distances, affine, shallow, deep, active
