"""Run every CUDA kernel on small inputs of every kind: what the memory checkers watch.

    python benchmarks/device_smoke.py [BACKEND [DEVICE [DTYPE]]]        by default cuda cuda, and every dtype

The shapes make every path run. Losses: few and many classes, rows that begin at any alignment, several experts in one
tensor or in several, strided classes, rows shared by several blocks. Fusion: few and many channels and positions,
channels-last and NCHW maps, strided ones, with and without statistics, ReLU and the residual end.
"""

import itertools
import sys
from collections.abc import Iterable

import torch

from shike_fast import ops

SHAPES = [(1, 2, 2), (3, 33, 100), (3, 5, 1001), (4, 2, 8142), (8, 3, 257), (3, 1, 20_011)]
MAPS = [(2, 1, 1, 1), (3, 5, 3, 2), (9, 64, 8, 8), (2, 72, 7, 7), (5, 257, 5, 3)]


def layouts(logits: torch.Tensor) -> list:
    """The same values as one tensor, as a sequence of unaligned slices, and with strided classes."""
    experts, batch, classes = logits.shape
    slices = logits.new_zeros(batch, experts * (classes + 1)).split(classes + 1, dim=1)
    strided = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return [logits, [piece[:, 1:].copy_(expert) for piece, expert in zip(slices, logits, strict=True)], strided]


def fusion_layouts(values: torch.Tensor) -> list[torch.Tensor]:
    """The same map channels-last, NCHW, and with strides of 2."""
    padded = values.new_zeros(*values.shape[:3], 2 * values.shape[3])[..., ::2].copy_(values)
    return [values.to(memory_format=torch.channels_last), values, padded]


def finite_or_exit(tensors: Iterable[torch.Tensor], what: str) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        sys.exit(f"not finite: {what}")


def run_losses(backend: str, device: str, dtype: torch.dtype) -> None:
    for experts, batch, classes in SHAPES:
        target = torch.randint(classes, (batch,), device=device)
        counts = torch.randint(1, 100, (classes,), device=device)
        values = torch.randn(experts, batch, classes, device=device).to(dtype)
        for logits, scale in zip(layouts(values), (1.0, 1024.0, 1024.0), strict=True):
            leaves = [logits] if isinstance(logits, torch.Tensor) else logits
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            argument = leaves[0] if isinstance(logits, torch.Tensor) else leaves
            loss = (
                ops.dkt_loss(argument, target, backend=backend)
                + ops.balanced_softmax_loss(argument, target, counts, backend=backend)
                + ops.expert_cross_entropy(argument, target, label_smoothing=0.1, backend=backend)
            )
            # Gradients that were written for the grad_output before, and others.
            gradients = torch.autograd.grad(scale * loss, leaves)
            with torch.no_grad():
                alone = ops.dkt_loss(argument, target, backend=backend)
            what = f"{backend}, {dtype}, [K, B, C] = {[experts, batch, classes]}"
            finite_or_exit((loss, alone, *gradients), what)


def run_fusion(backend: str, device: str, dtype: torch.dtype) -> None:
    for shape in MAPS:
        channels = shape[1]
        for layout in range(3):
            maps = [fusion_layouts(torch.randn(shape, device=device).to(dtype))[layout] for _ in range(6)]
            leaves = [map_.detach().requires_grad_() for map_ in maps]
            for training, folded in itertools.product((False, True), repeat=2):
                norms = [
                    ops.BatchNormArguments(
                        torch.rand(channels, device=device),
                        torch.randn(channels, device=device),
                        torch.zeros(channels, device=device),
                        torch.ones(channels, device=device),
                        training=training,
                    )
                    for _ in range(4)
                ]
                end = {"shortcut": leaves[4:], "deep_norms": norms[2:]} if folded else {}
                f = (
                    ops.dkf_experts(
                        leaves[:2], leaves[2:4], norms[:2], relu=[True, False], backend=backend, **end
                    ).sum()
                    + ops.dkf_pool(*leaves[:2], backend=backend).sum()
                )
                gradients = torch.autograd.grad(f, leaves if folded else leaves[:4])
                finite_or_exit((f, *gradients), f"{backend}, {dtype}, [B, C, H, W] = {list(shape)}")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(backend: str = "cuda", device: str = "cuda", name: str | None = None) -> None:
    if name is not None and name not in DTYPES:
        sys.stderr.write(f"error: DTYPE must be one of {', '.join(DTYPES)}, got {name}\n")
        sys.exit(2)
    for dtype in DTYPES.values() if name is None else [DTYPES[name]]:
        run_losses(backend, device, dtype)
        run_fusion(backend, device, dtype)
    print("every kernel ran" if name is None else f"every kernel ran in {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
