"""The networks against the published code: logits, gradients and whole loss sequences, recorded in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shike_fast import models, ops

CASES = [("resnet8", "resnet8_moe"), ("resnet32", "resnet32_moe")]


@pytest.fixture(params=CASES, ids=[name for name, _ in CASES])
def case(request, golden, published_state):
    name, file = request.param
    arrays = golden(file)
    model = models.create_model(name, num_classes=len(arrays["class_counts"])).double()
    model.load_state_dict(models.convert_reference_state_dict(published_state(file)))
    return model, arrays, torch.from_numpy(arrays["images"]).double(), torch.from_numpy(arrays["target"])


@pytest.mark.parametrize(("stage", "key"), [(1, "eval_logits"), (2, "eval_logits_stage2")])
def test_eval_logits(case, stage, key):
    model, arrays, images, _ = case
    with torch.no_grad():
        logits = model.eval()(images, stage=stage)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, torch.from_numpy(arrays[key]), rtol=0, atol=1e-12)


def test_first_gradients(case, published_state, request):
    model, arrays, images, target = case
    ops.dkt_loss(model(images), target).backward()

    # Renaming needs a complete state_dict: zeros stand for what has no recorded gradient.
    recorded = {key.removeprefix("grad/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("grad/")}
    state = published_state(request.node.callspec.params["case"][1])
    expected = models.convert_reference_state_dict({**{k: torch.zeros_like(v) for k, v in state.items()}, **recorded})

    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["rt_classifiers.weight"]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            largest = expected[name].abs().max().item()
            assert largest > 0, name
            # stored in float32, whose rounding is 6e-8 relative
            torch.testing.assert_close(
                parameter.grad,
                expected[name].double(),
                rtol=0,
                atol=1e-7 * largest,
                msg=lambda message, name=name: f"{name}: {message}",
            )


def test_loss_sequences_of_both_stages(case):
    model, arrays, images, target = case
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses = [_step(optimizer, ops.dkt_loss(model(images), target)) for _ in arrays["train_losses"]]
    _assert_sequence(losses, arrays["train_losses"])

    model.requires_grad_(False)
    for parameter in model.stage2_parameters():
        parameter.requires_grad_(True)
    frozen = model.conv1.weight.clone()
    updates = int(model.bn1.num_batches_tracked)
    class_counts = torch.from_numpy(arrays["class_counts"])
    other = copy.deepcopy(model)
    published = copy.deepcopy(model)
    losses = _stage2_losses(model, images, lambda z: ops.balanced_softmax_loss(z, target, class_counts), arrays)
    bias = class_counts.double().log()
    expected = _stage2_losses(other, images, lambda z: sum(F.cross_entropy(k + bias, target) for k in z), arrays)
    _assert_sequence(losses, np.array(expected))
    # The recorded losses contain a logarithm in float32, which not every processor rounds alike.
    rounded = _stage2_losses(
        published, images, lambda z: ops.expert_cross_entropy(z, target, bias=bias.float()), arrays
    )
    _assert_sequence(rounded, arrays["stage2_losses"], rtol=2e-7, atol=0)
    assert torch.equal(model.conv1.weight, frozen)
    # BatchNorm goes on counting, also in the layer that runs inside the fused operator
    assert int(model.bn1.num_batches_tracked) == updates + len(losses)
    assert int(model.fusions[0].norms[-1].num_batches_tracked) == updates + len(losses)


def _step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _stage2_losses(model, images, loss, arrays):
    optimizer = torch.optim.SGD(model.stage2_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return [_step(optimizer, loss(model(images, stage=2))) for _ in arrays["stage2_losses"]]


def _assert_sequence(losses, expected, rtol=0.0, atol=1e-9):
    losses = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(losses, torch.from_numpy(expected), rtol=rtol, atol=atol)
