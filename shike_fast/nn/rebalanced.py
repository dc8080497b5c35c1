"""Classifiers that re-balance what another one, or the features, have learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast import ops
from shike_fast.nn.classifiers import LinearClassifier
from shike_fast.ops.expert_logits import NORMALIZE_EPS


class ScaledClassifier(nn.Module):
    r"""Learnable weight scaling: :math:`z_k = s_k (f_k W_k + b_k)` with a factor for each class, of the bias too.

    ``forward(features)`` takes and returns what the classifier does. The scales [K, C] start as 1.

    Args:
        classifier: the one that is scaled; it belongs to another module, which has its parameters.

    Source: Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 4.
    """

    def __init__(self, classifier: LinearClassifier) -> None:
        super().__init__()
        self._scaled = (classifier,)  # a tuple keeps it from becoming a part of this module
        self.scales = nn.Parameter(classifier.weight.new_ones(classifier.num_experts, classifier.num_classes))

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        logits: Tensor = self._scaled[0](features)
        return logits * self.scales.unsqueeze(1)


class NormalizedClassifier(LinearClassifier):
    r"""A linear classifier that is tested with shorter weights and without bias: :math:`z_k = f_k W_k / \|W_k\|^\tau`.

    In training mode it is a :class:`LinearClassifier`. The norm is that of a class, over D.

    Args:
        num_experts, dim, num_classes, precision, backend: as for that.
        tau: 0 leaves the weights, 1 gives all of them length 1.

    Source: Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 4.
    """

    def __init__(self, num_experts: int, dim: int, num_classes: int, tau: float = 1.0, **options: Any) -> None:
        super().__init__(num_experts, dim, num_classes, **options)
        if not (math.isfinite(tau) and tau >= 0):
            raise ValueError(f"NormalizedClassifier: tau must be a number of at least 0, got {tau}")
        self.tau = tau

    def normalized_weight(self) -> Tensor:
        """[K, D, C]"""
        return self.weight / self.weight.norm(dim=1, keepdim=True) ** self.tau

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        if self.training:
            return super().forward(features)
        stacked = features if isinstance(features, Tensor) else torch.stack(list(features))
        return ops.expert_logits(
            stacked, self.normalized_weight(), None, precision=self.precision, backend=self.backend
        )


class ClassMeanClassifier(nn.Module):
    r"""Nearest class mean: :math:`z_k[c] = s \cos(f_k, \mu_{k,c})` with the mean feature of each class.

    ``forward(features)`` takes [K, B, D] and returns [K, B, C]. A class whose features it has not seen has logits of 0.

    Attributes:
        sums: [K, C, D], the sum of each class's features of length 1; a buffer.
        scale: s, a parameter that changes no prediction of one expert; it starts as 10.

    Args:
        num_experts, dim, num_classes: K, D, C.

    Source: Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 4.
    """

    sums: Tensor

    def __init__(self, num_experts: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_experts, num_classes, dim))
        self.scale = nn.Parameter(torch.tensor(10.0))

    @staticmethod
    def sums_of(features: Tensor, target: Tensor, num_classes: int, *, normalize: bool = True) -> Tensor:
        """What a batch adds to ``sums``: features [K, B, D], made of length 1, and int64 [B] -> [K, C, D]."""
        classes = torch.arange(num_classes, device=target.device).unsqueeze(1)
        of_class = (classes == target).to(features.dtype)  # [C, B]
        return of_class @ (F.normalize(features, dim=2, eps=NORMALIZE_EPS) if normalize else features)

    def forward(self, features: Tensor) -> Tensor:
        # the length of a mean does not count, so that the sum serves as well
        return self.scale * ops.expert_logits(features, self.sums.transpose(1, 2), cosine_scale=1.0)


class BranchClassifier(nn.Module):
    r"""Branches of one feature with a common classifier, as of ResLT.

    .. math:: z_j = W \mathrm{relu}(\mathrm{BN}(V_j f)) + b

    ``forward(features)`` takes [1, B, D] and returns the logits of J branches, [J, B, C].

    Args:
        branches: J.
        dim, num_classes: D, C.
    """

    def __init__(self, branches: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.branches = branches
        self.split = nn.Linear(dim, branches * dim, bias=False)  # a 1x1 convolution of the pooled feature
        self.norm = nn.BatchNorm1d(branches * dim)
        self.common = nn.Linear(dim, num_classes)
        nn.init.normal_(self.split.weight, std=math.sqrt(2 / dim))

    def forward(self, features: Tensor) -> Tensor:
        _, batch, dim = features.shape
        with torch.autocast(features.device.type, enabled=False):
            features = features[0].to(self.split.weight.dtype)
            branches = F.relu(self.norm(self.split(features))).view(batch, self.branches, dim)
            logits: Tensor = self.common(branches)
        return logits.transpose(0, 1)
