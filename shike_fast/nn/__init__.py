"""Modules built on :mod:`shike_fast.ops`: the classifiers of all experts, depth-wise knowledge fusion, losses.

:class:`AdaptFormer` is an adapter for a frozen transformer.

:class:`SyncBatchNorm` takes batch statistics over all processes, on the CPU too.

Tensor layouts: ``K`` experts, ``B`` samples, ``C`` classes, ``D`` feature channels. Every module works in a user's
own network.
"""

from shike_fast.nn.adapters import AdaptFormer
from shike_fast.nn.batch_first import BatchFirst
from shike_fast.nn.classifiers import CosineClassifier, LinearClassifier
from shike_fast.nn.fusion import DepthwiseKnowledgeFusion, fuse_experts
from shike_fast.nn.losses import BalancedSoftmaxLoss, DKTLoss, ExpertCrossEntropyLoss, ExpertKLLoss, ExpertLoss
from shike_fast.nn.rebalanced import BranchClassifier, ClassMeanClassifier, NormalizedClassifier, ScaledClassifier
from shike_fast.nn.sync_batch_norm import SyncBatchNorm, arguments_of, convert_sync_batchnorm

__all__ = [
    "AdaptFormer",
    "BalancedSoftmaxLoss",
    "BatchFirst",
    "BranchClassifier",
    "ClassMeanClassifier",
    "CosineClassifier",
    "DKTLoss",
    "DepthwiseKnowledgeFusion",
    "ExpertCrossEntropyLoss",
    "ExpertKLLoss",
    "ExpertLoss",
    "LinearClassifier",
    "NormalizedClassifier",
    "ScaledClassifier",
    "SyncBatchNorm",
    "arguments_of",
    "convert_sync_batchnorm",
    "fuse_experts",
]
