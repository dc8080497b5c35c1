"""Runs kernels into which errors have been put (faults.py), and tells what is noticed."""

import re
from collections.abc import Callable
from typing import Any

import torch
from common import strided
from faults import FAULTS, Fault
from host import Order, cuda, load_text, native_loss, ops, readable, text_of
from outcomes import error, reported
from torch import Tensor

Outcome = tuple[cuda, float]  # and the error, relative to what is allowed


def _gradient(
    logits: Tensor, target: Tensor, processors: int = 132, keeps: bool = False
) -> tuple[cuda, Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with cuda(processors, keeps=keeps) as device:
        loss = ops.dkt_loss(leaf, target, backend="cpu")
        loss.backward()
    assert leaf.grad is not None
    return device, loss.detach(), leaf.grad


def _dkt(classes: int, batch: int = 2, offset: int = 1, processors: int = 132, keeps: bool = False) -> Outcome:
    """Two experts in float32."""
    torch.manual_seed(0)
    strides = (batch * classes + offset, classes, 1)
    logits, target = strided(torch.randn(2, batch, classes) * 3, strides, offset), torch.randint(0, classes, (batch,))
    device, loss, gradient = _gradient(logits, target, processors, keeps)
    exact = logits.detach().double().requires_grad_()
    expected = ops.dkt_loss(exact, target, backend="reference")
    expected.backward()
    assert exact.grad is not None
    return device, max(error(loss, expected.detach()), error(gradient, exact.grad)) / 1e-5


def _rounding() -> Outcome:
    """The gradient in bfloat16 is that in float32, rounded."""
    torch.manual_seed(0)
    logits, target = (torch.randn(2, 4, 512) * 3).bfloat16(), torch.randint(0, 512, (4,))
    _, _, wide = _gradient(logits.float(), target)
    device, _, narrow = _gradient(logits, target)
    return device, (wide.bfloat16() != narrow).float().mean().item() / 0.01


def _traps() -> Outcome:
    """A target that is no class."""
    device = cuda()
    with device:
        try:
            native_loss.dkt_forward([torch.randn(2, 1, 50)], torch.tensor([50]), None, 10.0, 1.0, 0.0, -30.0, False)
        except RuntimeError:
            return device, 0.0
    return device, 2.0


def _norm(order: Order | None = None) -> Outcome:
    """Fusion in training, channels last, several samples a block."""
    torch.manual_seed(0)
    batch, channels = 5, 256
    strides = (25 * channels, 1, 5 * channels, channels)
    maps = [strided(torch.randn(batch, channels, 5, 5), strides) for _ in range(2)]

    def evaluate(dtype: torch.dtype, backend: str) -> list[Tensor]:
        deep, shallow = (map_.detach().to(dtype).requires_grad_() for map_ in maps)
        f = ops.dkf_bn_pool(deep, shallow, None, None, None, None, training=True, relu=True, backend=backend)
        gradients = torch.autograd.grad(f.square().sum(), [deep, shallow])
        return [f.detach(), *gradients]

    with cuda(1, order or Order()) as device:
        mine = evaluate(torch.float32, "cpu")
    exact = evaluate(torch.float64, "reference")
    return device, max(error(a, b) for a, b in zip(mine, exact, strict=True)) / 2e-5


SCENARIOS: dict[str, Callable[[], Outcome]] = {
    "row": lambda: _dkt(3000),
    "aligned row": lambda: _dkt(3000, offset=0),
    "row of a block": lambda: _dkt(20000),
    "kept row": lambda: _dkt(3000, offset=0, keeps=True),
    "many rows": lambda: _dkt(10, 70),
    "rounding": _rounding,
    "no class": _traps,
    "fusion": _norm,
}


def changed(fault: Fault, text: str) -> str:
    """The module with the error in it."""
    starts = [(match.start(), match[1]) for match in re.finditer(r"\.entry (\w+)", text)]
    (number,) = [i for i, (_, mangled) in enumerate(starts) if readable(mangled) == fault.kernel]
    start = starts[number][0]
    end = starts[number + 1][0] if number + 1 < len(starts) else len(text)
    seen = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal seen
        seen += 1
        return match.expand(fault.replacement) if fault.skip < seen <= fault.skip + fault.count else match.group()

    body = re.sub(fault.pattern, replace, text[start:end])
    assert body != text[start:end], f"{fault.name}: nothing to change"
    return text[:start] + body + text[end:]


def run() -> dict[str, Any]:
    """Of each scenario as it is, and of each fault: the reports, and the error relative to what is allowed."""
    found = {}
    for name, scenario in SCENARIOS.items():
        device, size = scenario()
        found[name] = [reported(device), size]
    texts = {room: text_of(room) for room in ("losses", "fusion")}
    for fault in FAULTS:
        text = texts["fusion" if fault.kernel.startswith("dkf_") else "losses"]
        load_text(changed(fault, text))
        device, size = SCENARIOS[fault.scenario]()
        found[fault.name] = [reported(device), size]
        load_text(text)
    return found
