"""What the losses say about arguments they cannot use: op, argument, expected and got."""

import pytest
import torch

from shike_fast import ops

K, B, C = 3, 4, 5
LOGITS = torch.zeros(K, B, C)
TARGET = torch.tensor([0, 1, 2, 4])


def balanced_softmax_loss(logits, target, **options):
    return ops.balanced_softmax_loss(logits, target, torch.ones(C), **options)


LOSSES = {
    "dkt_loss": ops.dkt_loss,
    "expert_cross_entropy": ops.expert_cross_entropy,
    "balanced_softmax_loss": balanced_softmax_loss,
    "expert_loss": ops.expert_loss,
    "expert_kl": lambda logits, target, **options: ops.expert_kl(logits, target=target, **options),
}

BAD = {
    "target of another dtype": (
        LOGITS, TARGET.int(), TypeError, "target must be int64 [B=4], got int32 [4]; pass target.long()",
    ),
    "target of floating point": (
        LOGITS, TARGET.float(), TypeError, "target must be int64 [B=4], got float32 [4]",
    ),
    "one-hot int64 target": (
        LOGITS, torch.eye(C, dtype=torch.int64)[:B], ValueError,
        "target must be int64 [B=4], got int64 [4, 5]; if it is one-hot, pass target.argmax(1)",
    ),
    "logits [B, K, C]": (
        LOGITS.transpose(0, 1), TARGET, ValueError,
        "target must be int64 [B=3], got int64 [4]; logits [4, 3, 5] are read as [K, B, C], "
        "if they are [B, K, C] pass logits.transpose(0, 1)",
    ),
    "a list of too many experts": (
        list(LOGITS.transpose(0, 1)), TARGET, ValueError,
        "target must be int64 [B=3], got int64 [4]; a list of logits is read as K tensors [B, C], "
        "if yours are B tensors [K, C] pass torch.stack(logits, 1)",
    ),
    "sparse logits": (
        LOGITS.to_sparse(), TARGET, TypeError, "logits must be a dense tensor, got a sparse_coo one",
    ),
    "target too long": (
        LOGITS, torch.zeros(6, dtype=torch.int64), ValueError, "target must be int64 [B=4], got int64 [6]",
    ),
    "target of two dimensions": (
        LOGITS, TARGET[:, None], ValueError, "target must be int64 [B=4], got int64 [4, 1]",
    ),
    "target a list": (
        LOGITS, [0, 1, 2, 4], TypeError,
        "target must be an int64 tensor [B=4], got list; pass torch.as_tensor(target)",
    ),
    "target nothing": (
        LOGITS, object(), TypeError, "target must be an int64 tensor [B=4], got object",
    ),
    "target too large": (
        LOGITS, torch.tensor([0, 1, 2, 5]), IndexError, "target must lie in 0..4 (C=5), got 5",
    ),
    "target negative": (
        LOGITS, torch.tensor([0, -100, 2, 9]), IndexError, "target must lie in 0..4 (C=5), got -100",
    ),
    "target on another device": (
        LOGITS, TARGET.to("meta"), ValueError, "target must be on cpu as logits, got int64 [4] on meta",
    ),
    "logits of two dimensions": (
        LOGITS[0], TARGET, ValueError, "logits must be [K, B, C] or K tensors [B, C], got float32 [4, 5]",
    ),
    "integer logits": (
        LOGITS.long(), TARGET, TypeError,
        "logits must be float16, bfloat16, float32 or float64, got int64 [3, 4, 5]",
    ),
    "complex logits": (
        LOGITS.cfloat(), TARGET, TypeError,
        "logits must be float16, bfloat16, float32 or float64, got complex64 [3, 4, 5]",
    ),
    "logits an array": (
        LOGITS.numpy(), TARGET, TypeError,
        "logits must be a tensor [K, B, C] or a list or tuple of K [B, C], got ndarray",
    ),
    "no expert": (
        LOGITS[:0], TARGET, ValueError,
        "logits must have K >= 1 experts and C >= 2 classes, got [K, B, C] = [0, 4, 5]",
    ),
    "one class": (
        LOGITS[..., :1], torch.zeros_like(TARGET), ValueError,
        "logits must have K >= 1 experts and C >= 2 classes, got [K, B, C] = [3, 4, 1]",
    ),
    "empty sequence": (
        [], TARGET, ValueError, "logits must have K >= 1 experts, got an empty list",
    ),
    "sequence of other things": (
        [LOGITS[0], None], TARGET, TypeError, "logits[1] must be a tensor [B, C], got NoneType",
    ),
    "sequence of vectors": (
        (LOGITS[0, 0],), TARGET, ValueError, "logits[0] must be [B, C], got float32 [5]",
    ),
    "sequence of several shapes": (
        [LOGITS[0], LOGITS[1, :2]], TARGET, ValueError, "logits[1] must be [4, 5] as logits[0], got float32 [2, 5]",
    ),
    "sequence of several dtypes": (
        [LOGITS[0], LOGITS[1].half()], TARGET, TypeError,
        "logits[1] must be float32 [4, 5] as logits[0], got float16 [4, 5]",
    ),
    "sequence on several devices": (
        [LOGITS[0], LOGITS[1].to("meta")], TARGET, ValueError,
        "logits[1] must be on cpu as logits[0], got float32 [4, 5] on meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", BAD)
def test_message(name, case):
    logits, target, error, message = BAD[case]
    with pytest.raises(error) as caught:
        LOSSES[name](logits, target)
    assert str(caught.value) == f"{name}: {message}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_mixed_devices(name):
    with pytest.raises(ValueError, match=rf"^{name}: target must be on cuda:0 as logits, got int64 \[4\] on cpu$"):
        LOSSES[name](LOGITS.cuda(), TARGET)


@pytest.mark.parametrize("name", LOSSES)
def test_target_values_are_not_read_on_another_device(name):
    # A meta tensor has no values: reading them would fail, and on a GPU it would wait for the device.
    bad_target = torch.full((B,), C, device="meta")
    logits = LOGITS.to("meta")
    if name == "balanced_softmax_loss":
        loss = ops.balanced_softmax_loss(logits, bad_target, torch.ones(C, device="meta"))
    else:
        loss = LOSSES[name](logits, bad_target)
    assert loss.shape == () and loss.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("metal", ValueError, "backend must be None or one of 'reference', 'cpu', 'triton', 'cuda', got 'metal'"),
        ("cuda", RuntimeError, "backend 'cuda' cannot run: "),
    ],
)
def test_backend(name, backend, error, message):
    with pytest.raises(error) as caught:
        LOSSES[name](LOGITS, TARGET, backend=backend)
    assert str(caught.value).startswith(f"{name}: {message}")
