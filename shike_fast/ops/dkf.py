"""Depth-wise knowledge fusion: the product of a deep and a normalised shallow feature map, pooled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shike_fast.ops import _dispatch
from shike_fast.ops._checks import (
    MAPS,
    accumulation_dtype,
    as_map,
    check_channel_vector,
    check_finite,
    check_maps,
    describe,
)
from shike_fast.ops._dispatch import Operator
from shike_fast.ops._distributed import fuse_synced
from shike_fast.ops._dkf_arguments import BatchNormArguments
from shike_fast.ops._fused_dkf import fuse
from shike_fast.ops._guards import has_tangent, is_transformed, materialised

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def dkf_pool(deep: Tensor, shallow: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply two feature maps and average over the positions.

        f[b, c] = 1/(H·W) Σ_{h,w} deep[b, c, h, w] · shallow[b, c, h, w]

    float16 and bfloat16 maps are multiplied and summed in float32; autocast does not change the result.

    Args:
        deep: float16, bfloat16, float32 or float64 [B, C, H, W] (C, H, W ≥ 1), or tokens [B, N, C], whose positions
            are N; any strides (channels-last and contiguous tokens preferred).
        shallow: the same shape and device; its dtype may differ.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        [B, C] in the dtype to which PyTorch promotes the two maps' dtypes (their common dtype when they agree),
        differentiable with respect to both maps.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device or backend name.
        RuntimeError: the named backend cannot run.

    Source: SHIKE (CVPR 2023), section 3.2, depth-wise knowledge fusion.
    """
    check_maps("dkf_pool", deep, shallow)
    pooled: Tensor = _POOL.run(backend, [as_map(deep)], [as_map(shallow)], [], [], [False])
    return pooled


def dkf_bn_pool(
    deep: Tensor,
    shallow: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    backend: str | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Normalise the shallow map over the batch, multiply with the deep one and average over the positions.

        f = dkf_pool(deep, [relu] batch_norm(shallow))

    The normalised map is not rounded to float16 or bfloat16 before it is multiplied. Running statistics change in
    place exactly as ``torch.nn.functional.batch_norm`` changes them: momentum, unbiased variance, untouched by an
    empty batch and in evaluation.

    Args:
        deep: float16, bfloat16, float32 or float64 [B, C, H, W] or [B, N, C], as for :func:`dkf_pool`.
        shallow: the same shape and device; its dtype may differ. In training B·H·W, or B·N, must not be 1.
        weight: γ, floating point [C], or ``None`` for 1.
        bias: β, floating point [C], or ``None`` for 0.
        running_mean: floating point [C], updated in place when training; ``None`` only together with ``running_var``
            and in training.
        running_var: floating point [C], likewise.
        training: normalise with the statistics of this batch; else with the running ones.
        momentum: the share of this batch in the new running statistics. The cumulative average of
            ``BatchNorm2d(momentum=None)`` is the module's matter, which passes 1 / num_batches_tracked.
        eps: added to the variance, > 0.
        relu: apply ReLU to the normalised map.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        process_group: in training, take the statistics over the batches of all processes of this
            ``torch.distributed`` group, as ``torch.nn.SyncBatchNorm`` does, on every device; ``None``: over this
            process's batch. Every process of the group has to take part; only vectors [C] are exchanged.

    Returns:
        [B, C] in the dtype to which PyTorch promotes the two maps' dtypes (their common dtype when they agree),
        differentiable with respect to both maps, weight and bias. The dtypes of weight, bias and running statistics do
        not influence it.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device, eps or backend name, missing running statistics, or one value per channel in
            training.
        RuntimeError: the named backend cannot run.

    Source: SHIKE (CVPR 2023), section 3.2; Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    check_maps("dkf_bn_pool", deep, shallow)
    deep, shallow = as_map(deep), as_map(shallow)
    norm = BatchNormArguments(weight, bias, running_mean, running_var, training, momentum, eps)
    norm = _checked_norm("dkf_bn_pool", "", norm, shallow, process_group)
    return _run(_BN_POOL, backend, [deep], [shallow], [], [norm], [relu], process_group)


def dkf_experts(
    deep: Sequence[Tensor],
    shallow: Sequence[Tensor],
    norms: Sequence[BatchNormArguments],
    *,
    relu: Sequence[bool],
    shortcut: Sequence[Tensor] | None = None,
    deep_norms: Sequence[BatchNormArguments] | None = None,
    backend: str | None = None,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """``dkf_bn_pool`` of K experts at once, with the end of each expert's own last block if wanted.

        f_k = mean_hw( D_k · [relu] batch_norm(shallow_k) )
        D_k = deep_k, or, with ``shortcut`` and ``deep_norms``, relu(batch_norm(deep_k) + shortcut_k)

    One launch a stage serves all experts, and nothing of the size of a map is stored between forward and backward but
    the maps passed in: with ``shortcut`` neither the normalised deep map nor D.

    Args:
        deep: K tensors, floating [B, C, H, W] or [B, N, C], of one shape and device, any strides (channels-last and
            contiguous tokens preferred).
        shallow: K tensors of the same shape and device.
        norms: K, what ``dkf_bn_pool`` takes for the shallow maps, as :class:`shike_fast.ops.BatchNormArguments`.
        relu: K, whether ReLU follows the normalisation of the shallow map.
        shortcut: K tensors of the same shape and device, given together with ``deep_norms``: what the residual
            connection adds.
        deep_norms: K, the last normalisation of each deep branch.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        process_group: as for ``dkf_bn_pool``, for all normalisations that train.

    Returns:
        [K, B, C] in the dtype to which PyTorch promotes the maps' dtypes, differentiable with respect to all maps,
        weights and biases. With ``shortcut`` no sum is rounded to a lower precision before it is multiplied.

    Raises:
        TypeError, ValueError, RuntimeError: as ``dkf_bn_pool``; ValueError too if the sequences differ in length.

    Source: SHIKE (CVPR 2023), section 3.2; the residual block of He et al., 2016.
    """
    maps = _checked_maps(deep, shallow, shortcut, deep_norms)
    for name, members in (("norms", norms), ("relu", relu), ("deep_norms", deep_norms)):
        if members is not None and len(members) != len(deep):
            raise ValueError(f"dkf_experts: {name} must have K={len(deep)} members, got {len(members)}")
    all_norms = [
        _checked_norm("dkf_experts", f"{name}[{k}].", norm, maps[1][0], process_group)
        for name, members in (("norms", norms), ("deep_norms", deep_norms or ()))
        for k, norm in enumerate(members)
    ]
    if process_group is not None and len({norm.training for norm in all_norms}) > 1:
        raise ValueError("dkf_experts: process_group needs norms that all train, or none")
    return _run(_EXPERTS, backend, *maps, all_norms, [bool(flag) for flag in relu], process_group)


def _run(
    operator: Operator,
    backend: str | None,
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],
    relu: list[bool],
    group: "ProcessGroup | None",
) -> Tensor:
    """f, with the statistics of this process or, in training, of a group."""
    arguments = deep, shallow, shortcut, norms, relu
    if group is None or not norms[0].training:
        fused: Tensor = operator.run(backend, *arguments)
        return fused
    # A process without samples has to take part whatever backend is named, but runs no kernel.
    chosen = "reference" if deep[0].shape[0] == 0 else operator.choose(backend, *arguments)
    f = fuse_synced(operator.name, *arguments, group, chosen)
    return f if operator is _EXPERTS else f.squeeze(0)


# ---- checks


def _checked_maps(
    deep: Sequence[Tensor],
    shallow: Sequence[Tensor],
    shortcut: Sequence[Tensor] | None,
    deep_norms: Sequence[BatchNormArguments] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    if (shortcut is None) != (deep_norms is None):
        missing = "shortcut" if shortcut is None else "deep_norms"
        raise ValueError(f"dkf_experts: shortcut and deep_norms must both be given or both be None, got no {missing}")
    for name, maps in (("deep", deep), ("shallow", shallow), ("shortcut", shortcut or [])):
        if not isinstance(maps, list | tuple):
            kind = type(maps).__name__
            raise TypeError(f"dkf_experts: {name} must be a list or tuple of K tensors {MAPS}, got {kind}")
    if len(deep) == 0:
        raise ValueError("dkf_experts: deep must have K >= 1 members, got none")
    for name, members in (("shallow", shallow), ("shortcut", shortcut)):
        if members is not None and len(members) != len(deep):
            raise ValueError(f"dkf_experts: {name} must have K={len(deep)} members, got {len(members)}")
    check_maps("dkf_experts", deep[0], deep[0], ("deep[0]", "deep[0]"))
    for name, maps in (("deep", deep), ("shallow", shallow), ("shortcut", shortcut or [])):
        for k, map_ in enumerate(maps):
            check_maps("dkf_experts", deep[0], map_, ("deep[0]", f"{name}[{k}]"))
    return [as_map(m) for m in deep], [as_map(m) for m in shallow], [as_map(m) for m in shortcut or []]


def _checked_norm(
    op: str, prefix: str, norm: BatchNormArguments, map_: Tensor, process_group: "ProcessGroup | None"
) -> BatchNormArguments:
    for name in ("weight", "bias", "running_mean", "running_var"):
        check_channel_vector(op, prefix + name, getattr(norm, name), map_)
    if (norm.running_mean is None) != (norm.running_var is None):
        missing = "running_mean" if norm.running_mean is None else "running_var"
        raise ValueError(
            f"{op}: {prefix}running_mean and {prefix}running_var must both be given or both be None, "
            f"got no {prefix}{missing}"
        )
    for name, statistic in (("running_mean", norm.running_mean), ("running_var", norm.running_var)):
        if statistic is not None and ((statistic.requires_grad and torch.is_grad_enabled()) or has_tangent(statistic)):
            raise ValueError(f"{op}: {prefix}{name} must not require gradients, it is a constant of the normalisation")
    if norm.running_mean is None and not norm.training:
        raise ValueError(
            f"{op}: {prefix}running_mean and {prefix}running_var must be given when training=False, got None"
        )
    if norm.training and process_group is None and map_.shape[0] * map_.shape[2] * map_.shape[3] == 1:
        raise ValueError(f"{op}: Expected more than 1 value per channel when training, got input size {map_.shape}")
    momentum, eps = check_finite(op, **{prefix + "momentum": norm.momentum, prefix + "eps": norm.eps})
    if eps <= 0.0:
        raise ValueError(f"{op}: {prefix}eps must be > 0, got {eps}")
    return norm._replace(momentum=momentum, eps=eps)


# ---- the reference


def _composite_pool(deep: Tensor, shallow: Tensor) -> Tensor:
    result = torch.promote_types(deep.dtype, shallow.dtype)
    dtype = accumulation_dtype(result)
    return (deep.to(dtype) * shallow.to(dtype)).mean((2, 3)).to(result)


def _batch_norm(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    training: bool,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    # batch_norm wants all its tensors in one dtype, and leaves a lazily negated view as it was. Where the tensor itself
    # will not do, the update is copied back.
    mean = None if running_mean is None else materialised(running_mean.to(dtype))
    var = None if running_var is None else materialised(running_var.to(dtype))
    normalised = F.batch_norm(
        x.to(dtype),
        mean,
        var,
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        training,
        momentum,
        eps,
    )
    if training:
        for running, updated in ((running_mean, mean), (running_var, var)):
            if running is not None and updated is not None and (running.dtype != dtype or running.is_neg()):
                running.copy_(updated)
    return normalised


def _composite_bn_pool(
    deep: Tensor,  # [B, C, H, W]
    shallow: Tensor,  # [B, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    result = torch.promote_types(deep.dtype, shallow.dtype)
    dtype = accumulation_dtype(result)
    normalised = _batch_norm(shallow, weight, bias, running_mean, running_var, training, momentum, eps, dtype)
    activated = normalised.relu() if relu else normalised
    return (deep.to(dtype) * activated).mean((2, 3)).to(result)


def _reference_bn_pool(*args: Any) -> Tensor:
    # an operator that changes some of its arguments in place is closed to torch.func.vmap and torch.func.functionalize
    pooled: Tensor = (_composite_bn_pool if is_transformed() else _BN_POOL.op)(*args)
    return pooled


def _reference(
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],
    relu: list[bool],
) -> Tensor:
    result = deep[0].dtype
    for map_ in (*deep, *shallow, *shortcut):
        result = torch.promote_types(result, map_.dtype)
    dtype, pooled = accumulation_dtype(result), []
    for k, map_ in enumerate(deep):
        if shortcut:
            map_ = (_batch_norm(map_, *norms[len(deep) + k], dtype) + shortcut[k].to(dtype)).relu()
        pooled.append(_reference_bn_pool(map_, shallow[k], *norms[k], relu[k]).to(result))
    return torch.stack(pooled)


# ---- the fused kernels


def _refuses(
    backend: str,
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],
    relu: list[bool],
) -> str | None:
    for map_ in (*deep, *shallow, *shortcut):
        if (reason := _dispatch.refuses_tensor(backend, map_, "the maps are")) is not None:
            return reason
        if map_.dtype != deep[0].dtype:
            return f"it takes maps of one dtype, got {describe(deep[0])} and {describe(map_)}"
    if any(norm.training != norms[0].training for norm in norms):
        return "some normalisations train and some do not"
    if deep[0].shape[0] == 0:
        return "the batch is empty"
    return None


def _fuse_by_groups(
    backend: str,
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],
    relu: list[bool],
) -> Tensor:
    """The kernels take eight experts at most; no expert needs another."""
    experts, most = len(deep), _dispatch.MAX_EXPERTS
    if experts <= most:
        return fuse(backend, deep, shallow, shortcut, norms, relu)
    spans = [slice(i, i + most) for i in range(0, experts, most)]
    own, of_deep = norms[:experts], norms[experts:]  # the latter with a shortcut
    return torch.cat([fuse(backend, deep[s], shallow[s], shortcut[s], own[s] + of_deep[s], relu[s]) for s in spans])


# ---- the records: dkf_pool and dkf_bn_pool are dkf_experts with one expert, without and with a normalisation

_POOL = Operator("dkf_pool", "(Tensor deep, Tensor shallow) -> Tensor", _composite_pool)
_BN_POOL = Operator(
    "dkf_bn_pool",
    "(Tensor deep, Tensor shallow, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "bool training, float momentum, float eps, bool relu) -> Tensor",
    _composite_bn_pool,
)
_EXPERTS = Operator("dkf_experts")
_POOL.add("reference", lambda deep, shallow, *_: _POOL.op(deep[0], shallow[0]))
_BN_POOL.add(
    "reference",
    lambda deep, shallow, _, norms, relu: _reference_bn_pool(deep[0], shallow[0], *norms[0], relu[0]),
)
_EXPERTS.add("reference", _reference)
for _operator in (_POOL, _BN_POOL):
    _operator.add_fused(lambda *args: fuse(*args).squeeze(0), _refuses)
_EXPERTS.add_fused(_fuse_by_groups, _refuses)
