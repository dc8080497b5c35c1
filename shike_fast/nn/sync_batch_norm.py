"""Batch normalisation with statistics over all processes that also works on the CPU; PyTorch's needs a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.ops import BatchNormArguments, _reference_dkf
from shike_fast.ops._checks import FLOAT_DTYPES, accumulation_dtype, describe
from shike_fast.ops._fused import cpu_missing
from shike_fast.ops._fused_dkf import kernels_of, update_running, vectors_of
from shike_fast.ops._library import differentiable_once, is_plain, materialised
from shike_fast.ops._synced_statistics import synced_statistics

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


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every BatchNorm in a module, and the module itself if it is one, by a :class:`SyncBatchNorm`.

    Like ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: parameters and buffers stay the same tensors under the same
    names, so optimizers and state_dicts remain valid; hooks on a replaced module are lost. A module in several places
    remains one. PyTorch's ``SyncBatchNorm`` is replaced too, and keeps its group unless one is given; modules of
    this class are left as they are.

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
        result = SyncBatchNorm(
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
    """What BatchNorm2d.forward passes to F.batch_norm: which statistics to use and update, and how fast."""
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | SyncBatchNorm)
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


@torch.compiler.disable
def _normalise(x: Tensor, norm: BatchNormArguments, group: dist.ProcessGroup) -> Tensor:
    weight, bias = vectors_of([norm], accumulation_dtype(x.dtype))
    y: Tensor = _Normalise.apply(group, norm, x, weight, bias)
    return y


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        norm: BatchNormArguments,
        x: Tensor,  # [B, C, ...]
        weight: Tensor | None,  # [C] in the accumulation dtype
        bias: Tensor | None,
    ) -> Tensor:
        x = materialised(x)
        kernels = kernels_of("cpu") if cpu_missing() is None and is_plain(x) else _reference_dkf
        normalisers, statistics, total = synced_statistics([_as_map(x)], kernels, [norm.eps], group)
        if total.item() == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if total.item() > 0:
            update_running([norm], statistics)
        mean, rest, rstd = normalisers[0]
        ctx.save_for_backward(x, weight, mean, rest, rstd)
        ctx.call = group, total.to(mean.dtype)
        # γ (x − mean − rest)/σ + β, with the rest moved into the offset
        scale = rstd if weight is None else weight * rstd
        offset = -rest * scale if bias is None else bias - rest * scale
        distance = x - _column(mean, x)
        return torch.addcmul(_column(offset, x), distance, _column(scale, x), out=distance).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, weight, *normaliser = saved
        group, total = ctx.call
        needs = ctx.needs_input_grad[2:]
        computed = _gradients(incoming, x, weight, normaliser, group, total, of_input=needs[0])
        gradients = [gradient if needed else None for gradient, needed in zip(computed, needs, strict=True)]
        if torch.is_grad_enabled():  # a graph of the backward is wanted
            present = [tensor for tensor in saved if tensor is not None]
            gradients = [
                None if g is None else differentiable_once("SyncBatchNorm", g, incoming, *present) for g in gradients
            ]
        return None, None, *gradients


@torch.no_grad()
def _gradients(
    incoming: Tensor,
    x: Tensor,
    weight: Tensor | None,
    normaliser: list[Tensor],
    group: dist.ProcessGroup,
    total: Tensor,
    *,
    of_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of the input, where it is wanted, of weight and bias; the latter two from this process alone."""
    mean, rest, rstd = normaliser
    positions = [dim for dim in range(x.dim()) if dim != 1]
    incoming = incoming.to(mean.dtype)
    distance = x - _column(mean, x)
    # dβ = Σ dy, dγ = Σ dy x̂ with x̂ = (x − mean − rest)/σ
    d_bias = incoming.sum(positions)
    d_weight = ((incoming * distance).sum(positions) - rest * d_bias) * rstd
    if not of_input:
        return None, d_weight, d_bias
    everywhere = torch.stack([d_weight, d_bias])
    dist.all_reduce(everywhere, group=group)
    mean_weight, mean_bias = everywhere / total
    # dx = γ/σ (dy − dβ/N − x̂ dγ/N), with dγ and dβ of all processes
    scale = rstd if weight is None else weight * rstd
    slope = -scale * rstd * mean_weight
    offset = -scale * mean_bias - slope * rest
    dx = torch.addcmul(_column(offset, x), distance, _column(slope, x), out=distance)
    dx.addcmul_(incoming, _column(scale, x))
    return dx.to(x.dtype), d_weight, d_bias


def _as_map(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, C, H, W], without a copy where x is contiguous or channels-last."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, x.shape[2:].numel())


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """[C] over the positions of x."""
    return vector.view(-1, *[1] * (x.dim() - 2))
