"""Batch normalisation with statistics over all processes that also works on the CPU; PyTorch's needs a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.ops._checks import FLOAT_DTYPES, describe
from shike_fast.ops._dispatch import cpu_missing
from shike_fast.ops._distributed import normalise, plain_statistics
from shike_fast.ops._dkf_arguments import BatchNormArguments
from shike_fast.ops._fused_dkf import kernels_of
from shike_fast.ops._guards import is_plain, materialised

_TORCH: Any = nn.SyncBatchNorm  # its methods are borrowed: they ask for attributes only, not for the class


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    r"""Batch normalisation with statistics over all processes: :class:`torch.nn.SyncBatchNorm`, on the CPU too.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with mean and biased variance of a channel over the batches of all processes, which may differ in size; one of them
    may be empty. On other devices than the CPU it does what PyTorch's class does; in evaluation mode and in a group of
    one process, what :class:`torch.nn.BatchNorm2d` does. In training on the CPU, every forward exchanges 2C + 1
    numbers with the other processes and every backward 2C, through a backend for the CPU such as Gloo.

    It is no subclass of PyTorch's class: ``DistributedDataParallel`` refuses networks on the CPU that contain one.

    ``forward(input)`` takes [B, C, ...] with two dimensions or more, floating, any strides (channels-last is kept),
    and returns the same shape and dtype. Statistics are computed in float32 at least, and exchanged in float64. The
    gradients of weight and bias are those of this process's outputs; ``DistributedDataParallel`` averages them.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as for :class:`torch.nn.BatchNorm2d`.
        process_group: the processes over which statistics are taken; ``None``: all.

    Raises:
        ValueError: ``forward`` gets one dimension, no channels or, in training, a single value per channel in all
            processes together; in training in several processes on the CPU also another number of channels than C.
        TypeError: in training in several processes on the CPU, the input is not floating.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    _check_input_dim = _TORCH._check_input_dim
    _check_non_zero_input_channels = _TORCH._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return _TORCH.forward(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = process_group_of(self)
        if group is not None:
            self._check_before_exchange(input)
        norm = arguments_of(self)
        if group is not None:
            return _normalise(input, norm, group)
        mean, var = norm.running_mean, norm.running_var
        return F.batch_norm(input, mean, var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)

    def _check_before_exchange(self, input: Tensor) -> None:
        """A process that fails after the others have its numbers would leave them waiting for the next ones."""
        if input.dtype not in FLOAT_DTYPES:
            raise TypeError(f"SyncBatchNorm: input must be floating, got {describe(input)}")
        if input.shape[1] != self.num_features:
            raise ValueError(f"SyncBatchNorm: input must be [B, C={self.num_features}, ...], got {describe(input)}")


class _SyncBatchNormAct(SyncBatchNorm):
    """One that timm's ``BatchNormAct2d`` becomes, whose dropout and activation follow the normalisation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(input)))
        return result


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every BatchNorm in a module, and the module itself if it is one, by a :class:`SyncBatchNorm`.

    Like ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: parameters and buffers stay the same tensors under the same
    names, so optimizers and state_dicts remain valid; hooks on a replaced module are lost. A module in several places
    remains one. PyTorch's ``SyncBatchNorm`` is replaced too, and keeps its group unless one is given; modules of
    this class are left as they are. The activation of timm's ``BatchNormAct2d`` is kept.

    Args:
        module: converted in place, unless it is a BatchNorm itself.
        process_group: the processes over which statistics are taken; ``None``: all.

    Returns:
        The module, or the new one in its place.
    """
    return _converted(module, process_group, {})


def _converted(module: nn.Module, process_group: Any, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    result = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm):
        group = getattr(module, "process_group", None) if process_group is None else process_group
        has_activation = {"act", "drop"} <= module._modules.keys()
        result = (_SyncBatchNormAct if has_activation else SyncBatchNorm)(
            module.num_features,
            module.eps,
            module.momentum,
            affine=False,  # no memory for parameters that are about to be replaced
            track_running_stats=module.track_running_stats,
            process_group=group,
        )
        result.affine = module.affine
        result.weight, result.bias = module.weight, module.bias
        result.running_mean, result.running_var = module.running_mean, module.running_var
        result.num_batches_tracked = module.num_batches_tracked
        result.training = module.training
    done[module] = result
    for name, child in module._modules.items():  # named_children() leaves out the second place of a module
        if child is not None:
            result.add_module(name, _converted(child, process_group, done))
    return result


def process_group_of(norm: nn.Module) -> Any:
    """The processes over which a SyncBatchNorm in training takes its statistics; None: this one alone."""
    if (
        not isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm)
        or not norm.training
        or not dist.is_available()
        or not dist.is_initialized()
    ):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def arguments_of(norm: nn.Module) -> BatchNormArguments:
    """What a BatchNorm module passes to ``F.batch_norm``, for :func:`shike_fast.ops.dkf_experts` in its place.

    In training it counts the batch, as the module's own ``forward`` does: call it once a step.

    Args:
        norm: a ``BatchNorm2d``, ``torch.nn.SyncBatchNorm`` or :class:`SyncBatchNorm`, in training or evaluation mode.

    Returns:
        Weight, bias, the running statistics to use and update, whether to take those of the batch, momentum and eps.
        As ``ops.dkf_bn_pool`` calls them: ``**nn.arguments_of(norm)._asdict()``.

    Raises:
        TypeError: it is another module.
    """
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | SyncBatchNorm):
        raise TypeError(f"arguments_of: norm must be a BatchNorm2d or SyncBatchNorm, got {type(norm).__name__}")
    training = norm.training or norm.running_mean is None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    tracks = not norm.training or norm.track_running_stats
    return BatchNormArguments(
        norm.weight,
        norm.bias,
        norm.running_mean if tracks else None,
        norm.running_var if tracks else None,
        training,
        momentum,
        norm.eps,
    )


@torch._disable_dynamo
def _normalise(x: Tensor, norm: BatchNormArguments, group: dist.ProcessGroup) -> Tensor:
    x = materialised(x)
    native = cpu_missing() is None and is_plain(x)
    statistics_of = kernels_of("cpu").dkf_statistics if native else plain_statistics
    refusal = f"Expected more than 1 value per channel when training, got input size {x.shape}"
    return normalise("SyncBatchNorm", [x], [norm], group, statistics_of, refusal)[0]
