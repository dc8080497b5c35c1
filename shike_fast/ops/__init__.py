"""Losses and feature fusion of multi-expert long-tail training, registered as ``torch.ops.shike_fast.*``."""

from shike_fast.ops._dispatch import backend_reasons, backends, needs_verification, verdicts, verify, what_runs
from shike_fast.ops._dkf_arguments import BatchNormArguments
from shike_fast.ops.balanced_softmax import balanced_softmax_loss
from shike_fast.ops.cross_entropy import expert_cross_entropy
from shike_fast.ops.dkf import dkf_bn_pool, dkf_experts, dkf_pool
from shike_fast.ops.dkt import dkt_loss
from shike_fast.ops.expert_logits import expert_logits
from shike_fast.ops.expert_loss import ExpertKL, ExpertRows, expert_kl, expert_loss

__all__ = [
    "BatchNormArguments",
    "ExpertKL",
    "ExpertRows",
    "backend_reasons",
    "backends",
    "balanced_softmax_loss",
    "dkf_bn_pool",
    "dkf_experts",
    "dkf_pool",
    "dkt_loss",
    "expert_cross_entropy",
    "expert_kl",
    "expert_logits",
    "expert_loss",
    "needs_verification",
    "verdicts",
    "verify",
    "what_runs",
]
