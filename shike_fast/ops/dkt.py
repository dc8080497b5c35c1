"""Dynamic knowledge transfer: the stage-1 objective over K experts."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from shike_fast.ops import _native_loss
from shike_fast.ops._checks import accumulation_dtype, as_list, check_finite, check_logits, check_target
from shike_fast.ops._dispatch import kernels
from shike_fast.ops._guards import is_plain
from shike_fast.ops._losses import fused_loss, loss_operator

_NAME = "dkt_loss"


@overload
def dkt_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    hardest_weight: float = ...,
    mutual_weight: float = ...,
    kl_reduction: str = ...,
    teacher_target_logit: float = ...,
    student_target_logit: float = ...,
    detach_teacher: bool = ...,
    return_terms: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def dkt_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    hardest_weight: float = ...,
    mutual_weight: float = ...,
    kl_reduction: str = ...,
    teacher_target_logit: float = ...,
    student_target_logit: float = ...,
    detach_teacher: bool = ...,
    return_terms: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def dkt_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    hardest_weight: float = 10.0,
    mutual_weight: float = 1.0,
    kl_reduction: str = "mean",
    teacher_target_logit: float = 0.0,
    student_target_logit: float = -30.0,
    detach_teacher: bool = False,
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the dynamic knowledge transfer loss of K experts.

        L = Σ_k CE(z_k, y)  +  α Σ_k KL(q ‖ ŝ_k)  +  β Σ_{i≠j} KL(p_j ‖ p_i)

    with ``p_k = softmax(z_k)``, ``ŝ_k = softmax(z_k with z_k[y] = student_target_logit)`` and the teacher ``q =
    softmax(r)``: ``r[c] = max_k z_k[c]``, but ``r[h] = mean_k z_k[h]`` at the hardest negative ``h = argmax_{c≠y} Σ_k
    z_k[c]``, and ``r[y] = teacher_target_logit``. Ties take the lowest expert (max) and the lowest class (argmax). The
    sum over experts that chooses h is taken in the accumulation dtype, expert 0 first.

    CE is the mean over the batch. Gradients flow through the teachers q and p_j too, unless ``detach_teacher``;
    nothing flows to ``r[y]``. float16 and bfloat16 logits are computed in float32, and only the finished gradient is
    rounded; autocast does not change the result.

    Args:
        logits: float16, bfloat16, float32 or float64 [K, B, C], or a list or tuple of K tensors [B, C]; any strides.
            K ≥ 1, C ≥ 2; B = 0 gives a loss of 0. More than eight experts run on the reference, several times slower.
        target: int64 [B], classes in 0..C-1. A value out of range raises on the CPU in eager mode; elsewhere it is as
            undefined as for ``torch.nn.functional.cross_entropy``.
        hardest_weight: α, the weight of the hardest-negative term.
        mutual_weight: β, the weight of the mutual term.
        kl_reduction: ``"mean"`` divides both divergences by B·C (the published choice), ``"batchmean"`` by B.
        teacher_target_logit: the value of ``r[y]``.
        student_target_logit: the value that replaces ``z_k[y]`` in ``ŝ_k``.
        detach_teacher: treat q and p_j as constants.
        return_terms: return the three terms as well.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The loss, a scalar (float64 for float64 logits, else float32), differentiable with respect to the logits. With
        ``return_terms`` the pair (loss, terms): terms is float32 [3] = (cross-entropy, hardest, mutual), weights
        applied, detached.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device, ``kl_reduction`` or backend name, or a number that is not finite.
        IndexError: a target out of range (CPU, eager).
        RuntimeError: the named backend cannot run.

    Source: Jin et al., "Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation",
    CVPR 2023, and the authors' published code.
    """
    first, shape = check_logits(_NAME, logits)
    check_target(_NAME, target, first, shape)
    if kl_reduction not in ("mean", "batchmean"):
        raise ValueError(f"{_NAME}: kl_reduction must be 'mean' or 'batchmean', got {kl_reduction!r}")
    hardest_weight, mutual_weight, teacher_logit, student_logit = check_finite(
        _NAME,
        hardest_weight=hardest_weight,
        mutual_weight=mutual_weight,
        teacher_target_logit=teacher_target_logit,
        student_target_logit=student_target_logit,
    )
    options = (hardest_weight, mutual_weight, kl_reduction, teacher_logit, student_logit, detach_teacher)
    loss, terms = _OPERATOR.run(backend, logits, target, *options)
    return (loss, terms) if return_terms else loss


def _divisor(kl_reduction: str, classes: int) -> int:
    """Of the divergences, beside B."""
    return classes if kl_reduction == "mean" else 1


# ---- the reference


def _composite(
    logits: Tensor,  # [K, B, C]
    target: Tensor,  # [B]
    hardest_weight: float,
    mutual_weight: float,
    kl_reduction: str,
    teacher_target_logit: float,
    student_target_logit: float,
    detach_teacher: bool,
) -> tuple[Tensor, Tensor]:
    # Only element-wise operators and reductions, on float32 or float64: none of them is in autocast's lower-precision
    # list.
    z = logits.to(accumulation_dtype(logits.dtype))
    experts, batch, classes = z.shape
    rows = max(batch, 1)  # an empty batch sums to 0
    divergence_scale = 1.0 / (rows * _divisor(kl_reduction, classes))
    y = target.unsqueeze(1)  # [B, 1]
    y_of_experts = y.expand(experts, -1, -1)  # [K, B, 1]

    log_p = z.log_softmax(2)
    cross_entropy = -log_p.gather(2, y_of_experts).sum() / rows

    hardest = mutual = torch.zeros_like(cross_entropy)
    if hardest_weight != 0.0:
        reformed = _reformed_teacher(z, y, teacher_target_logit)
        log_q = (reformed.detach() if detach_teacher else reformed).log_softmax(1)  # [B, C]
        log_s = z.scatter(2, y_of_experts, student_target_logit).log_softmax(2)  # [K, B, C]
        # Σ_k KL(q ‖ ŝ_k) = Σ_c q (K log q − Σ_k log ŝ_k)
        divergence = (log_q.exp() * (experts * log_q - log_s.sum(0))).sum()
        hardest = (hardest_weight * divergence_scale) * divergence
    if mutual_weight != 0.0:
        log_teacher = log_p.detach() if detach_teacher else log_p
        # Σ_{i≠j} KL(p_j ‖ p_i) = Σ_c Σ_j p_j (K log p_j − Σ_i log p_i): the terms with i = j vanish
        divergence = (log_teacher.exp() * (experts * log_teacher - log_p.sum(0))).sum()
        mutual = (mutual_weight * divergence_scale) * divergence

    terms = torch.stack([cross_entropy.detach(), hardest.detach(), mutual.detach()]).to(torch.float32)
    return cross_entropy + hardest + mutual, terms


def _reformed_teacher(z: Tensor, y: Tensor, target_logit: float) -> Tensor:
    """The teacher's logits r [B, C] from the experts' logits z [K, B, C] and the targets y [B, 1]."""
    consensus, *others = z.detach().unbind(0)
    for expert in others:  # in this order: a defined rounding, so that every backend finds the same hardest negative
        consensus = consensus + expert
    hardest = consensus.scatter(1, y, -torch.inf).argmax(1, keepdim=True)  # [B, 1]
    mean_at_hardest = z.gather(2, hardest.expand(z.shape[0], -1, -1)).mean(0)  # [B, 1]
    strongest = z.max(0).values  # the gradient goes to the lowest expert that attains it
    return strongest.scatter(1, hardest, mean_at_hardest).scatter(1, y, target_logit)


# ---- the fused kernels

# The weights are Scalars because torch.compile keeps those symbolic where it sees what becomes of them: a schedule of
# weights does not recompile. Numbers that go into an opaque op are constants to it, hence the tensor of factors.
_FUSED = fused_loss(
    f"{_NAME}_fused",
    "Tensor target, Tensor? factors",  # float64 [2], factors of the two weights
    "Scalar hardest_weight, Scalar mutual_weight, float teacher_target_logit, float student_target_logit, "
    "bool detach_teacher",
    shown=1,
    # the kernels divide by B; what else divides is in the weights
    forward=lambda *args: kernels("dkt", args[-1], _native_loss).dkt_forward(*args[:-1]),
    backward=lambda *args, **kept: kernels("dkt", args[-1], _native_loss).dkt_backward(*args[:-1], **kept),
    both=lambda *args: _native_loss.dkt_both(*args[:-1]) if args[-1] in ("cpu", "cuda") else None,
    fake_forward=_native_loss.new_dkt_results,
)


def _fused(
    backend: str,
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    hardest_weight: float,
    mutual_weight: float,
    kl_reduction: str,
    *options: Any,
) -> Sequence[Tensor]:
    experts = as_list(logits)
    divisor = _divisor(kl_reduction, experts[0].shape[-1])
    if is_plain(*experts, target):
        return _FUSED.direct(
            (experts, target, None), (hardest_weight / divisor, mutual_weight / divisor, *options, backend)
        )[:2]
    factors = None
    if is_compiling() or torch.jit.is_tracing():
        one = experts[0].new_ones((), dtype=torch.float64)
        factors = torch.stack([one * hardest_weight, one * mutual_weight]) / divisor
        hardest_weight = mutual_weight = 1.0
    else:
        hardest_weight, mutual_weight = hardest_weight / divisor, mutual_weight / divisor
    return _FUSED.dispatched((experts, target, factors), (hardest_weight, mutual_weight, *options, backend))[:2]


# ---- the record

_OPERATOR = loss_operator(
    _NAME,
    "(Tensor logits, Tensor target, Scalar hardest_weight, Scalar mutual_weight, str kl_reduction, "
    "float teacher_target_logit, float student_target_logit, bool detach_teacher) -> (Tensor, Tensor)",
    _composite,
    fused=_fused,
)
