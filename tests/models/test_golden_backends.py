"""The recorded network on every backend and instruction set, in float32: logits, first gradients, losses."""

import importlib.util

import pytest
import torch

from shike_fast import models, ops
from shike_fast.ops._dispatch import OPERATORS
from shike_fast.ops._native import native

OPS = ("dkt_loss", "balanced_softmax_loss", "expert_cross_entropy", "dkf_pool", "dkf_bn_pool", "dkf_experts")


def only(monkeypatch, backend):
    """Let every op run on this backend and on no other."""
    for op in OPS:
        implementation = OPERATORS[op].backends[backend]
        monkeypatch.setattr(OPERATORS[op], "backends", {backend: implementation})
        monkeypatch.setattr(OPERATORS[op], "_orders", {})


@pytest.fixture(
    params=["reference", *native().cpu_levels(), *(pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda"))]
)
def device(request, monkeypatch):
    """The device of a backend, or of an instruction set of the CPU kernels, which alone is in use."""
    level = native().cpu_level()
    if request.param in native().cpu_levels():
        native().set_cpu_level(request.param)
    only(monkeypatch, "cpu" if request.param in native().cpu_levels() else request.param)
    yield torch.device("cuda" if request.param in ("triton", "cuda") else "cpu")
    native().set_cpu_level(level)


def compare_network(golden, published_state, device, layout, steps=3):
    arrays = golden("resnet8_moe")
    model = models.create_model("resnet8", num_classes=len(arrays["class_counts"]))
    model.load_state_dict(models.convert_reference_state_dict(published_state("resnet8_moe")))
    model = model.to(device, memory_format=layout)
    images = torch.from_numpy(arrays["images"]).float().to(device, memory_format=layout)
    target = torch.from_numpy(arrays["target"]).to(device)
    with torch.no_grad():
        logits = model.eval()(images)
    torch.testing.assert_close(logits.cpu().double(), torch.from_numpy(arrays["eval_logits"]), rtol=0, atol=2e-4)

    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses, expected = [], arrays["train_losses"][:steps]
    for _ in expected:
        optimizer.zero_grad()
        loss = ops.dkt_loss(model(images), target)
        loss.backward()
        if not losses:
            gradient = {name: parameter.grad.clone() for name, parameter in model.fusions.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    # Every step magnifies the rounding of float32, with the reference too: 3e-3 after the fourth.
    torch.testing.assert_close(torch.tensor(losses).double(), torch.from_numpy(expected), rtol=2e-3, atol=0)
    for k in range(3):
        last = len(model.fusions[k].norms) - 1
        for name, theirs in (("weight", "conv.1.weight"), ("bias", "conv.1.bias")):
            recorded = arrays[f"grad/shallow_exps.{k}.convs.StridedConv{last}.{theirs}"]
            recorded, mine = torch.from_numpy(recorded), gradient[f"{k}.norms.{last}.{name}"].cpu()
            assert (mine - recorded).abs().max() <= 2e-4 * recorded.abs().max()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "NCHW"])
def test_network(golden, published_state, device, layout):
    compare_network(golden, published_state, device, layout)


def check_interpreted_network(golden, published_state, monkeypatch):
    only(monkeypatch, "triton")
    compare_network(golden, published_state, torch.device("cpu"), torch.channels_last, steps=1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
def test_network_with_interpreted_triton(interpret):
    interpret(__file__, ["check_interpreted_network"])
