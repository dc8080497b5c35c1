"""Depth-wise knowledge fusion: the product of a deep and a normalised shallow feature map, pooled."""

import torch
from torch import Tensor
from torch.nn import functional as F

from shike_fast.ops import _backend
from shike_fast.ops._checks import accumulation_dtype, check_channel_vector, check_finite, check_maps
from shike_fast.ops._library import define_composite

_POOL = "dkf_pool"
_BN_POOL = "dkf_bn_pool"


def dkf_pool(deep: Tensor, shallow: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply two feature maps and average over the positions.

        f[b, c] = 1/(H·W) Σ_{h,w} deep[b, c, h, w] · shallow[b, c, h, w]

    float16 and bfloat16 maps are multiplied and summed in float32; autocast does not change the result.

    Args:
        deep: float16, bfloat16, float32 or float64 [B, C, H, W], any strides (channels-last preferred);
            C, H, W ≥ 1.
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
    check_maps(_POOL, deep, shallow)
    pooled: Tensor = _backend.run(_POOL, backend, deep, shallow)
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
) -> Tensor:
    """Normalise the shallow map over the batch, multiply with the deep one and average over the positions.

        f = dkf_pool(deep, [relu] batch_norm(shallow))

    The normalised map is not rounded to float16 or bfloat16 before it is multiplied. Running statistics change in
    place exactly as ``torch.nn.functional.batch_norm`` changes them: momentum, unbiased variance, untouched by an
    empty batch and in evaluation.

    Args:
        deep: float16, bfloat16, float32 or float64 [B, C, H, W], any strides (channels-last preferred);
            C, H, W ≥ 1.
        shallow: the same shape and device; its dtype may differ. In training B·H·W must not be 1.
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
    check_maps(_BN_POOL, deep, shallow)
    for name, vector in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        check_channel_vector(_BN_POOL, name, vector, deep)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{_BN_POOL}: running_mean and running_var must both be given or both be None, got no {missing}"
        )
    if running_mean is None and not training:
        raise ValueError(f"{_BN_POOL}: running_mean and running_var must be given when training=False, got None")
    if training and deep.shape[0] * deep.shape[2] * deep.shape[3] == 1:
        raise ValueError(
            f"{_BN_POOL}: Expected more than 1 value per channel when training, got input size {shallow.shape}"
        )
    momentum = check_finite(_BN_POOL, "momentum", momentum)
    eps = check_finite(_BN_POOL, "eps", eps)
    if eps <= 0.0:
        raise ValueError(f"{_BN_POOL}: eps must be > 0, got {eps}")
    pooled: Tensor = _backend.run(
        _BN_POOL, backend, deep, shallow, weight, bias, running_mean, running_var, training, momentum, eps, relu
    )
    return pooled


def _composite_pool(deep: Tensor, shallow: Tensor) -> Tensor:
    result = torch.promote_types(deep.dtype, shallow.dtype)
    dtype = accumulation_dtype(result)
    return (deep.to(dtype) * shallow.to(dtype)).mean((2, 3)).to(result)


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
    # batch_norm wants all its tensors in one dtype. ``to`` returns the tensor itself where that dtype is its own; else
    # the update is copied back.
    mean = None if running_mean is None else running_mean.to(dtype)
    var = None if running_var is None else running_var.to(dtype)
    normalised = F.batch_norm(
        shallow.to(dtype),
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
            if running is not None and updated is not None and running.dtype != dtype:
                running.copy_(updated)
    activated = normalised.relu() if relu else normalised
    return (deep.to(dtype) * activated).mean((2, 3)).to(result)


_pool_op = define_composite(f"{_POOL}(Tensor deep, Tensor shallow) -> Tensor", _composite_pool)
_bn_pool_op = define_composite(
    f"{_BN_POOL}(Tensor deep, Tensor shallow, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, bool relu) -> Tensor",
    _composite_bn_pool,
)
_backend.register(_POOL, "reference", _pool_op)
_backend.register(_BN_POOL, "reference", _bn_pool_op)
