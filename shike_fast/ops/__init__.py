"""Losses and feature fusion of multi-expert long-tail training, registered as ``torch.ops.shike_fast.*``."""

from shike_fast.ops._dispatch import (
    backend_reasons,
    backends,
    needs_verification,
    use_backend,
    verdicts,
    verify,
    what_runs,
)
from shike_fast.ops._dkf_arguments import BatchNormArguments
from shike_fast.ops._expert_checks import ExpertKL
from shike_fast.ops.balanced_softmax import balanced_softmax_loss
from shike_fast.ops.class_statistics import class_bias, class_margin, class_weight, hardest_classes
from shike_fast.ops.cross_entropy import expert_cross_entropy
from shike_fast.ops.dkf import dkf_bn_pool, dkf_experts, dkf_pool
from shike_fast.ops.dkt import dkt_loss
from shike_fast.ops.expert_kl import expert_kl
from shike_fast.ops.expert_logits import expert_logits
from shike_fast.ops.expert_loss import ExpertRows, expert_loss

__all__ = [
    "BatchNormArguments",
    "ExpertKL",
    "ExpertRows",
    "backend_reasons",
    "backends",
    "balanced_softmax_loss",
    "class_bias",
    "class_margin",
    "class_weight",
    "dkf_bn_pool",
    "dkf_experts",
    "dkf_pool",
    "dkt_loss",
    "expert_cross_entropy",
    "expert_kl",
    "expert_logits",
    "expert_loss",
    "hardest_classes",
    "needs_verification",
    "use_backend",
    "verdicts",
    "verify",
    "what_runs",
]
