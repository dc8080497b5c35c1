"""Logits of several experts for sweeps over the kernels of the losses: shapes, values, dtypes and layouts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shike_fast.ops import ExpertKL

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the largest entry of the gradient. Both sides see the same logits; a low-precision gradient is rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@st.composite
def logits_and_target(draw, most=200_000):
    """Logits of 1-8 experts, 0-300 samples and 2-10,000 classes (about ``most`` in all), and a target."""
    experts = draw(st.integers(1, 8))
    classes = draw(st.one_of(st.integers(2, 40), st.integers(41, 1025), st.integers(1026, 10_000)))
    batch = draw(st.integers(0, min(300, most // (experts * classes) + 1)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "equal", "dominated", "apart"]))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logits = torch.randn(experts, batch, classes, generator=generator, dtype=torch.float64)
    if kind == "ties":  # few values, exact in every dtype and in every sum
        logits, scale = logits.round(), min(scale, 16.0)
    elif kind == "equal":
        logits = torch.ones_like(logits)
    elif kind == "dominated":
        logits[:, :, draw(st.integers(0, classes - 1))] += 8.0
    elif kind == "apart":  # experts far from each other, each on its own level
        logits += 3.0 * torch.arange(experts, dtype=torch.float64).reshape(-1, 1, 1)
    logits = (logits * scale).clamp(-1e4, 1e4).to(draw(st.sampled_from(DTYPES)))
    return logits, torch.randint(classes, (batch,), generator=generator)


LAYOUTS = st.sampled_from(["contiguous", "classes last but one", "strided", "sequence", "sequence of slices"])


def lay_out(logits, layout):
    """The same values as leaves in another layout; and the gradient of those leaves as one [K, B, C] tensor."""
    if layout == "contiguous":
        leaf = logits.clone()
    elif layout == "classes last but one":  # [B, C, K] in memory
        leaf = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif layout == "strided":  # every third class of a larger tensor, rows padded
        experts, batch, classes = logits.shape
        leaf = logits.new_full((experts, batch, 3 * classes + 1), float("nan"))[:, :, : 3 * classes : 3]
        leaf.copy_(logits)
    elif layout == "sequence":
        leaf = [expert.clone() for expert in logits]
    else:  # slices of one larger tensor, at any alignment
        wide = logits.new_zeros(logits.shape[1], logits.shape[0] * (logits.shape[2] + 1))
        leaf = list(wide.split(logits.shape[2] + 1, dim=1))
        leaf = [to[:, 1:].copy_(expert) for to, expert in zip(leaf, logits, strict=True)]
    if isinstance(leaf, list):
        leaf = [expert.detach().requires_grad_() for expert in leaf]
        return leaf, lambda: torch.stack([expert.grad for expert in leaf])
    leaf.requires_grad_()
    return leaf, lambda: leaf.grad


def sweep(function, kernels, count, **strategies):
    """Try ``count`` examples; fewer with Triton, which compiles for every new number of experts, dtype and switch."""
    count = count // 8 if kernels[0] == "triton" else count
    settings(max_examples=count)(given(**strategies)(function))(kernels)


def moved(value, device, dtype):
    """An argument of expert_loss on the device; numbers in the dtype in which its kernels count."""
    if isinstance(value, ExpertKL):
        return ExpertKL(**{name: moved(part, device, dtype) for name, part in vars(value).items()})
    if not torch.is_tensor(value):
        return value
    return value.to(device, dtype) if value.dtype == torch.float64 else value.to(device)
