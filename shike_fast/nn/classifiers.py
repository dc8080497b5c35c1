"""The classifiers of all experts, each as one batched product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast import ops
from shike_fast.ops._checks import check_finite
from shike_fast.ops.expert_logits import NORMALIZE_EPS, check_precision


class _ExpertClassifier(nn.Module):
    """What the classifiers share: one weight [K, D, C] for all experts, and :func:`shike_fast.ops.expert_logits`."""

    def __init__(self, num_experts: int, dim: int, num_classes: int, precision: str, backend: str | None) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        check_precision(type(self).__name__, precision)
        self.num_experts, self.dim, self.num_classes = num_experts, dim, num_classes
        self.precision, self.backend = precision, backend
        self.weight = nn.Parameter(torch.empty(num_experts, dim, num_classes))

    def _logits(
        self, features: Tensor | Sequence[Tensor], bias: Tensor | None = None, cosine_scale: float | None = None
    ) -> Tensor:
        if not isinstance(features, Tensor):
            features = self._stacked(features)
        if features.dim() != 3 or features.shape[0] != self.num_experts or features.shape[2] != self.dim:
            expected = f"[K={self.num_experts}, B, D={self.dim}]"
            raise ValueError(f"{type(self).__name__}: features must be {expected}, got {list(features.shape)}")
        return ops.expert_logits(
            features,
            self.weight,
            bias,
            cosine_scale=cosine_scale,
            precision=self.precision,
            backend=self.backend,
        )

    def _stacked(self, features: Sequence[Tensor]) -> Tensor:
        name, expected = type(self).__name__, f"[K={self.num_experts}, B, D={self.dim}]"
        if not isinstance(features, list | tuple) or not all(isinstance(expert, Tensor) for expert in features):
            raise TypeError(
                f"{name}: features must be a tensor {expected} or a list or tuple of K tensors [B, D], "
                f"got {type(features).__name__}"
            )
        shapes = [list(expert.shape) for expert in features]
        if len(shapes) == 0 or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{name}: features must be {expected} or K tensors of one shape [B, D], got {shapes}")
        return torch.stack(list(features))

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, dim={self.dim}, num_classes={self.num_classes}"
        return f"{sizes}, precision={self.precision!r}"


class CosineClassifier(_ExpertClassifier):
    r"""One cosine classifier per expert, as one batched matrix product.

    .. math:: z_k = s \frac{f_k}{\max(\|f_k\|, \epsilon)} \frac{W_k}{\max(\|W_k\|, \epsilon)}, \quad \epsilon = 10^{-12}

    with the norm of a column (one class) of ``W_k`` over D. ``forward(features)`` takes [K, B, D] (or a list or tuple
    of K tensors [B, D]), floating, any strides, and returns [K, B, C] in float32 (float64 for float64 features), also
    under autocast: half precision would make the best classes tie. The weight starts uniform in (-1, 1) with columns of
    length 1.

    Args:
        num_experts: K, at least 1.
        dim: D, the number of feature channels.
        num_classes: C.
        scale: s, a positive number; the published value is 30.
        precision: ``"highest"``, with errors as in float32, or ``"high"``, which allows a GPU to round the factors to
            TF32; ``torch.set_float32_matmul_precision`` allows it as well. See :func:`shike_fast.ops.expert_logits`.
        backend: as for that operator.

    Raises:
        ValueError: an argument is out of range, or ``forward`` gets features of another shape.

    Source: the published code's normalised linear layer and its factor 30.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        num_classes: int,
        scale: float = 30.0,
        *,
        precision: str = "highest",
        backend: str | None = None,
    ) -> None:
        super().__init__(num_experts, dim, num_classes, precision, backend)
        (self.scale,) = check_finite("CosineClassifier", scale=scale)
        if self.scale <= 0:
            raise ValueError(f"CosineClassifier: scale must be a positive number, got {scale}")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew: uniform in (-1, 1), every column scaled to length 1."""
        with torch.no_grad():
            self.weight.uniform_(-1, 1)
            self.weight.copy_(F.normalize(self.weight, dim=1, eps=NORMALIZE_EPS))

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        return self._logits(features, cosine_scale=self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class LinearClassifier(_ExpertClassifier):
    r"""One linear classifier per expert, as one batched product: :math:`z_k = f_k W_k + b_k`.

    ``forward(features)`` takes [K, B, D] (or a list or tuple of K tensors [B, D]), floating, any strides, and returns
    [K, B, C] in float32 (float64 for float64 features), also under autocast. The weight [K, D, C] starts Kaiming normal
    (standard deviation sqrt(2/D)), the bias [K, C] uniform in (-1/sqrt(D), 1/sqrt(D)), as in the published code.

    Args:
        num_experts: K, at least 1.
        dim: D, the number of feature channels.
        num_classes: C.
        precision: as for :class:`CosineClassifier`.
        backend: likewise.

    Raises:
        ValueError: an argument is out of range, or ``forward`` gets features of another shape.
    """

    def __init__(
        self, num_experts: int, dim: int, num_classes: int, *, precision: str = "highest", backend: str | None = None
    ) -> None:
        super().__init__(num_experts, dim, num_classes, precision, backend)
        self.bias = nn.Parameter(torch.empty(num_experts, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.dim))
        nn.init.uniform_(self.bias, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        return self._logits(features, self.bias)
