"""The logits of K linear or cosine classifiers: one batched product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._autograd import Fused
from shike_fast.ops._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_dense,
    check_device,
    check_finite,
    describe,
)
from shike_fast.ops._dispatch import Operator, refuses_tensor, triton_kernels
from shike_fast.ops._guards import is_plain, materialised

NORMALIZE_EPS = 1e-12
PRECISIONS = ("highest", "high")
_NAME = "expert_logits"


def expert_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cosine_scale: float | None = None,
    precision: str = "highest",
    backend: str | None = None,
) -> Tensor:
    r"""Compute the logits of K linear classifiers, or with a ``cosine_scale`` s of K cosine classifiers.

        z_k = f_k W_k + b_k        or        z_k = s f_k / max(|f_k|, ε) · W_k / max(|W_k|, ε),   ε = 1e-12

    with the norm of a column (one class) of W_k over D. Computed in float32 at least, also under autocast: near 30 a
    bfloat16 logit has a spacing of 0.125, so the best classes would tie, and a tie goes to the lower, more frequent
    class.

    Args:
        features: float16, bfloat16, float32 or float64 [K, B, D]; any strides.
        weight: likewise [K, D, C].
        bias: likewise [K, C], or None; only without ``cosine_scale``.
        cosine_scale: s, a positive number, or None.
        precision: of the products on a GPU, in the words of :func:`torch.set_float32_matmul_precision`. ``"highest"``:
            a cosine errs by less than 2⁻²⁰, as in float32; the kernels split the factors for tensor cores (TF32x3).
            ``"high"`` allows factors cut to TF32, with errors up to 2⁻⁹. What PyTorch is set to allows it as well, and
            it alone decides for the reference.
        backend: ``None`` (the fastest that can run), ``"reference"`` or ``"triton"``.

    Returns:
        [K, B, C] in float32 (float64 for float64 features), differentiable with respect to features, weight and bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device, ``cosine_scale``, ``precision`` or backend name.
        RuntimeError: the named backend cannot run.

    Source: the published code's normalised linear layer and its factor 30.
    """
    _check_tensor("features", features, "[K, B, D]", features)
    _check_tensor("weight", weight, "[K, D, C]", features)
    if bias is not None:
        _check_tensor("bias", bias, "[K, C]", features)
    if features.dim() != 3 or 0 in (features.shape[0], features.shape[2]):
        raise ValueError(f"{_NAME}: features must be [K, B, D] with K, D >= 1, got {describe(features)}")
    experts, _, dim = features.shape
    if weight.dim() != 3 or weight.shape[:2] != (experts, dim) or weight.shape[2] == 0:
        raise ValueError(f"{_NAME}: weight must be [K={experts}, D={dim}, C >= 1], got {describe(weight)}")
    if bias is not None and bias.shape != (experts, weight.shape[2]):
        raise ValueError(f"{_NAME}: bias must be [K={experts}, C={weight.shape[2]}], got {describe(bias)}")
    if cosine_scale is not None:
        (cosine_scale,) = check_finite(_NAME, cosine_scale=cosine_scale)
        if not cosine_scale > 0:
            raise ValueError(f"{_NAME}: cosine_scale must be positive, got {cosine_scale}")
        if bias is not None:
            raise ValueError(f"{_NAME}: a cosine classifier has no bias, got {describe(bias)}")
    check_precision(_NAME, precision)
    logits: Tensor = _OPERATOR.run(backend, features, weight, bias, cosine_scale, precision)
    return logits


def _check_tensor(name: str, tensor: Tensor, expected: str, features: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a tensor {expected}, got {type(tensor).__name__}")
    check_dense(_NAME, name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{_NAME}: {name} must be floating point {expected}, got {describe(tensor)}")
    check_device(_NAME, name, tensor, features, "features")


def check_precision(what: str, precision: str) -> None:
    """Check the name of a precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"{what}: precision must be 'highest' or 'high', got {precision!r}")


# ---- the reference


def composite_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None, cosine_scale: float | None, precision: str
) -> Tensor:
    """The reference computation; its products have the precision that PyTorch is set to."""
    device = features.device.type
    # Some devices have no autocast (meta), and turning it off takes longer than all that is done here for one sample.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return composite_logits(features, weight, bias, cosine_scale, precision)
    dtype = accumulation_dtype(features.dtype)
    x, w = _as(dtype, features), _as(dtype, weight)
    if cosine_scale is not None:
        # The scale goes with the features' norms, [K, B, 1]; the weight's norms, [K, 1, C], divide the product: a
        # normalised weight is a copy of [K, D, C], and so are the gradients through it.
        return torch.bmm(x * (cosine_scale / _norm(x, dim=2)), w) / _norm(w, dim=1)
    return torch.bmm(x, w) if bias is None else torch.baddbmm(_as(dtype, bias).unsqueeze(1), x, w)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _norm(vectors: Tensor, dim: int) -> Tensor:
    """max(|v|, ε), the dimension kept."""
    return torch.linalg.vector_norm(vectors, dim=dim, keepdim=True).clamp_min(NORMALIZE_EPS)


# ---- the fused kernels, which are Triton's


def _forward(
    features: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    cosine_scale: float | None,
    precision: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_kernels("logits").logits_forward(
        features[0], weight[0], bias[0] if bias else None, cosine_scale, NORMALIZE_EPS, precision, any(wanted)
    )


def _fake_forward(
    features: list[Tensor], weight: list[Tensor], bias: list[Tensor], cosine_scale: float | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, wanted = features[0], weight[0], rest[1]
    z = x.new_empty(x.shape[0], x.shape[1], w.shape[2])
    if cosine_scale is None:
        return z, z.new_empty(0), z.new_empty(0), z.new_empty(0)
    kept = z.new_empty(z.shape if any(wanted) else 0)
    return z, x.new_empty(x.shape[:2]), x.new_empty(w.shape[0], w.shape[2]), kept


def _backward(
    grad_output: Tensor,
    features: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    features_norm: Tensor,
    weight_norm: Tensor,
    kept: Tensor,
    cosine_scale: float | None,
    precision: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    g, norms = grad_output.contiguous(), (features_norm, weight_norm)
    arguments = (g, features[0], weight[0], norms, kept, cosine_scale, NORMALIZE_EPS, precision, wanted)
    return [*triton_kernels("logits").logits_backward(*arguments), *(g.sum(1) for _ in bias)]


def _fake_backward(
    grad_output: Tensor, features: list[Tensor], weight: list[Tensor], bias: list[Tensor], *rest: Any
) -> list[Tensor]:
    given = features[0], weight[0]
    factors = [torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in zip(given, rest[5], strict=True)]
    return [*factors, *map(torch.empty_like, bias)]


_FUSED = Fused(f"{_NAME}_fused", forward=_forward, backward=_backward, differentiable=3).register(
    "Tensor[] features, Tensor[] weight, Tensor[] bias",
    "float? cosine_scale, str precision, bool[] wanted",
    "Tensor features_norm, Tensor weight_norm, Tensor kept",
    results="(Tensor, Tensor, Tensor, Tensor)",
    gradients="Tensor[]",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
)


def _fused_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None, cosine_scale: float | None, precision: str
) -> Tensor:
    x, w, *b = (materialised(_as(torch.float32, t)).contiguous() for t in (features, weight, bias) if t is not None)
    if _tf32_is_allowed():
        precision = "high"
    # A product for a gradient that nobody wants, of frozen features, would be a third of the work.
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, w)]
    run = _FUSED.direct if is_plain(x, w, *b) else _FUSED.dispatched
    return run(([x], [w], b), (cosine_scale, precision, wanted))[0]


def _tf32_is_allowed() -> bool:
    """Whether PyTorch is set to it for matrix products, however it was."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# The compiler cannot read it; it compiles anew where the setting has changed.
setattr(_tf32_is_allowed, "_dynamo_marked_constant", True)  # noqa: B010  # functions have no such attribute to mypy


def _refuses(features: Tensor, *_: Any) -> str | None:
    return refuses_tensor("triton", features, "the features are")


# ---- the record

_OPERATOR = Operator(
    _NAME,
    "(Tensor features, Tensor weight, Tensor? bias, float? cosine_scale, str precision) -> Tensor",
    composite_logits,
)
_OPERATOR.add("reference", composite_logits)  # visible to tracers and modes
_OPERATOR.add("triton", _fused_logits, refuses=_refuses)
