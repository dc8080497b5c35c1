"""What expert_loss and expert_kl say about arguments they cannot use: op, argument, expected and got."""

import numpy as np
import pytest
import torch

from shike_fast.ops import ExpertKL, expert_kl, expert_loss

K, B, C = 3, 4, 5
LOGITS = torch.zeros(K, B, C)
TARGET = torch.tensor([0, 1, 2, 4])
ONE_HOT = torch.eye(C)[:B]
OF_CLASSES, OF_ROWS = "[5] or [3, 5]", "[4] or [3, 4]"
BACKENDS = "None or one of 'reference', 'cpu', 'triton', 'cuda'"

BOTH = {  # of both ops
    "target of another dtype": (
        {"target": TARGET.int()},
        TypeError,
        "target must be int64 [B=4], got int32 [4]; pass target.long()",
    ),
    "target too large": ({"target": TARGET + 1}, IndexError, "target must lie in 0..4 (C=5), got 5"),
    "target elsewhere": (
        {"target": TARGET.to("meta")},
        ValueError,
        "target must be on cpu as logits, got int64 [4] on meta",
    ),
    "target a list": (
        {"target": [0, 1, 2, 4]},
        TypeError,
        "target must be an int64 tensor [B=4], got list; pass torch.as_tensor(target)",
    ),
    "target an expert too large": (
        {"target": torch.stack([TARGET, TARGET, TARGET + 1])},
        IndexError,
        "target must lie in 0..4 (C=5), got 5",
    ),
    "target of experts and floats": (
        {"target": torch.zeros(K, B)},
        TypeError,
        "target must be int64 [B=4], got float32 [3, 4]",
    ),
    "one-hot target": (
        {"target": ONE_HOT.long()},
        ValueError,
        "target must be int64 [B=4], got int64 [4, 5]; if it is one-hot, pass target.argmax(1)",
    ),
    "logits of two dimensions": (
        {"logits": LOGITS[0]},
        ValueError,
        "logits must be [K, B, C] or K tensors [B, C], got float32 [4, 5]",
    ),
    "integer logits": (
        {"logits": LOGITS.long()},
        TypeError,
        "logits must be float16, bfloat16, float32 or float64, got int64 [3, 4, 5]",
    ),
    "masked": (
        {"masked": "none", "class_mask": ONE_HOT.bool()},
        ValueError,
        "masked must be one of 'zero', 'exclude', 'partial', got 'none'",
    ),
    "mask of numbers": ({"class_mask": ONE_HOT}, TypeError, "class_mask must be bool [B=4, C=5], got float32 [4, 5]"),
    "mask of another shape": (
        {"class_mask": ONE_HOT.bool()[None]},
        ValueError,
        "class_mask must be bool [B=4, C=5], got bool [1, 4, 5]",
    ),
    "mask a list": (
        {"class_mask": [[True] * 5] * 4},
        TypeError,
        "class_mask must be a tensor bool [B=4, C=5], got list",
    ),
    "sparse mask": (
        {"class_mask": ONE_HOT.bool().to_sparse()},
        TypeError,
        "class_mask must be a dense tensor, got a sparse_coo one",
    ),
    "mask elsewhere": (
        {"class_mask": ONE_HOT.bool().to("meta")},
        ValueError,
        "class_mask must be on cpu as logits, got bool [4, 5] on meta",
    ),
    "backend": ({"backend": "gpu"}, ValueError, f"backend must be {BACKENDS}, got 'gpu'"),
    "backend that cannot run": (
        {"backend": "cuda"},
        RuntimeError,
        "backend 'cuda' cannot run: the logits are on cpu, not on a GPU",
    ),
}

LOSS = {
    "reduction": (
        {"reduction": "sum"},
        ValueError,
        "reduction must be one of 'mean', 'mean/K', 'weighted_mean', 'global_weighted_mean', 'none', got 'sum'",
    ),
    "a second label without its weight": (
        {"target_b": TARGET},
        ValueError,
        "target_b and lam come together, got one of them",
    ),
    "a weight without the label": ({"lam": 0.5}, ValueError, "target_b and lam come together, got one of them"),
    "second target too large": (
        {"target_b": TARGET + 3, "lam": 0.5},
        IndexError,
        "target_b must lie in 0..4 (C=5), got 7",
    ),
    "second target too short": (
        {"target_b": TARGET[1:], "lam": 0.5},
        ValueError,
        "target_b must be int64 [B=4], got int64 [3]; logits [3, 4, 5] are read as [K, B, C], "
        "if they are [B, K, C] pass logits.transpose(0, 1)",
    ),
    "lam of another shape": (
        {"target_b": TARGET, "lam": torch.ones(3)},
        ValueError,
        "lam must be [] or [4], got float32 [3]",
    ),
    "lam not finite": ({"target_b": TARGET, "lam": float("nan")}, ValueError, "lam must be finite, got nan"),
    "lam a word": (
        {"target_b": TARGET, "lam": "half"},
        TypeError,
        "lam must be a tensor, list or array of numbers [] or [4], got str",
    ),
    "label smoothing too large": (
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing must lie in 0..1, got 1.5",
    ),
    "label smoothing below 0": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must lie in 0..1, got -0.1"),
    "label smoothing of no number": (
        {"label_smoothing": None},
        TypeError,
        "label_smoothing must be a number, got NoneType",
    ),
    "bias of another shape": (
        {"bias": torch.zeros(4)},
        ValueError,
        f"bias must be {OF_CLASSES}, got float32 [4]",
    ),
    "bias of strings": (
        {"bias": ["a"] * 5},
        TypeError,
        f"bias must be a tensor, list or array of numbers {OF_CLASSES}, got list",
    ),
    "margin of bools": (
        {"margin": torch.ones(5, dtype=torch.bool)},
        TypeError,
        f"margin must be floating point or integer {OF_CLASSES}, got bool [5]",
    ),
    "scale of another shape": (
        {"scale": torch.ones(3)},
        ValueError,
        f"scale must be {OF_CLASSES}, got float32 [3]",
    ),
    "scale not finite": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    "class weight as rows": (
        {"class_weight": np.ones(4)},
        ValueError,
        f"class_weight must be {OF_CLASSES}, got float64 [4]",
    ),
    "sample weight by class": (
        {"sample_weight": torch.ones(5)},
        ValueError,
        f"sample_weight must be {OF_ROWS}, got float32 [5]",
    ),
    "sample weight elsewhere": (
        {"sample_weight": torch.ones(4, device="meta")},
        ValueError,
        "sample_weight must be on cpu as logits, got float32 [4] on meta",
    ),
    "expert weight of two": (
        {"expert_weight": [1.0, 2.0]},
        ValueError,
        "expert_weight must be [3], got float64 [2]",
    ),
    "sparse bias": (
        {"bias": torch.ones(5).to_sparse()},
        TypeError,
        "bias must be a dense tensor, got a sparse_coo one",
    ),
    "soft target of another shape": (
        {"soft_target": torch.ones(5)},
        ValueError,
        "soft_target must be [4, 5] or [3, 4, 5], got float32 [5]",
    ),
    **{
        f"soft target and {name}": (
            {"soft_target": ONE_HOT, **options},
            ValueError,
            "soft_target excludes margin, target_b and label_smoothing",
        )
        for name, options in {
            "margin": {"margin": torch.ones(5)},
            "second target": {"target_b": TARGET, "lam": 0.5},
            "smoothing": {"label_smoothing": 0.1},
        }.items()
    },
    "rows of a divergence": (
        {"kl": ExpertKL(), "reduction": "none"},
        ValueError,
        "kl needs a reduction other than 'none'; expert_kl adds it to rows of your own",
    ),
    "ensemble": ({"ensemble": "max"}, ValueError, "ensemble must be one of 'mean', 'sum', got 'max'"),
    "weight of the ensemble": (
        {"ensemble": "mean", "ensemble_weight": float("inf")},
        ValueError,
        "ensemble_weight must be finite, got inf",
    ),
    "rows of an ensemble": (
        {"ensemble": "mean", "reduction": "none"},
        ValueError,
        "ensemble needs a reduction other than 'none'",
    ),
    "ensemble with values by expert": (
        {"ensemble": "sum", "scale": torch.ones(3, 5), "sample_weight": torch.ones(3, 4)},
        ValueError,
        "ensemble has one row of all experts, got scale, sample_weight by expert",
    ),
    "ensemble with targets by expert": (
        {"ensemble": "sum", "target": TARGET.expand(3, 4)},
        ValueError,
        "ensemble has one row of all experts, got target by expert",
    ),
    "ensemble with second targets by expert": (
        {"ensemble": "sum", "target_b": TARGET.expand(3, 4), "lam": 0.5},
        ValueError,
        "ensemble has one row of all experts, got target_b by expert",
    ),
}  # fmt: skip

TEACHERS = "[B=4, C=5], [K=3, B, C] or K tensors [B, C]"
KL = {  # of both, as arguments or as fields
    "teacher": ({"teacher": "all"}, ValueError, "teacher must be one of 'others', 'mean', 'view', got 'all'"),
    "teacher of another shape": (
        {"teacher": torch.zeros(2, 4, 5)},
        ValueError,
        f"teacher must be {TEACHERS}, got float32 [2, 4, 5]",
    ),
    "teacher of too few": (
        {"teacher": [torch.zeros(4, 5)] * 2},
        ValueError,
        f"teacher must be {TEACHERS}, got float32 [2, 4, 5]",
    ),
    "teachers that differ": (
        {"teacher": [torch.zeros(4, 5), torch.zeros(4, 6), torch.zeros(4, 5)]},
        ValueError,
        f"teacher must be {TEACHERS}, got float32 [4, 5], float32 [4, 6], float32 [4, 5]",
    ),
    "no teacher": (
        {"teacher": []},
        TypeError,
        f"teacher must be 'others', 'mean', 'view' or logits {TEACHERS}, got list",
    ),
    "teacher of integers": (
        {"teacher": torch.zeros(4, 5, dtype=torch.int64)},
        TypeError,
        f"teacher must be floating point {TEACHERS}, got int64 [4, 5]",
    ),
    "teacher an array": (
        {"teacher": np.zeros((4, 5))},
        TypeError,
        f"teacher must be 'others', 'mean', 'view' or logits {TEACHERS}, got ndarray",
    ),
    "teacher elsewhere": (
        {"teacher": torch.zeros(4, 5, device="meta")},
        ValueError,
        "teacher must be on cpu as logits, got float32 [4, 5] on meta",
    ),
    "sparse teacher": (
        {"teacher": torch.zeros(4, 5).to_sparse()},
        TypeError,
        "teacher must be a dense tensor, got a sparse_coo one",
    ),
    "views of an odd batch": (
        {"teacher": "view", "logits": LOGITS[:, :3], "target": TARGET[:3]},
        ValueError,
        "teacher 'view' needs an even batch, two views of the same images, got B=3",
    ),
    "weight of both views": (
        {"teacher": "view", "weight": torch.ones(4)},
        ValueError,
        "weight must be [] or [2] or [3, 2], got float32 [4]",
    ),
    "reduction": (
        {"reduction": "sum"},
        ValueError,
        "reduction of the divergence must be one of 'batchmean', 'mean', 'gated_mean', got 'sum'",
    ),
    "weight_of": ({"weight_of": "pair"}, ValueError, "weight_of must be one of 'teacher', 'student', got 'pair'"),
    "eps": ({"eps": -1e-9}, ValueError, "eps must be at least 0, got -1e-09"),
    "eps of no number": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    "temperature a tensor": ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be positive, got -1.0"),
    "temperature of a class": ({"temperature": [1, 1, 0, 1, 1]}, ValueError, "temperature must be positive, got 0.0"),
    "temperature of another shape": (
        {"temperature": torch.ones(3, 5)},
        ValueError,
        "temperature must be [5], got float32 [3, 5]",
    ),
    "weight of another shape": (
        {"weight": torch.ones(5)},
        ValueError,
        "weight must be [] or [4] or [3, 4], got float32 [5]",
    ),
    "gate": ({"gate": "correct"}, ValueError, "gate must be one of 'teacher_correct', got 'correct'"),
    "gate of another shape": ({"gate": torch.ones(5)}, ValueError, f"gate must be {OF_ROWS}, got float32 [5]"),
    "gate of complex numbers": (
        {"gate": torch.ones(4, dtype=torch.cfloat)},
        TypeError,
        f"gate must be floating point or integer {OF_ROWS}, got complex64 [4]",
    ),
    "right students": (
        {"gate": "teacher_correct", "weight_of": "student"},
        ValueError,
        "gate 'teacher_correct' needs weight_of='teacher' among others",
    ),
}  # fmt: skip


def check(op, call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == f"{op}: {message}"


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("op", [expert_loss, expert_kl], ids=lambda op: op.__name__)
def test_arguments_of_both(op, case):
    options, error, message = BOTH[case]
    check(op.__name__, lambda: op(**{"logits": LOGITS, "target": TARGET} | options), error, message)


@pytest.mark.parametrize("case", LOSS)
def test_arguments_of_the_loss(case):
    options, error, message = LOSS[case]
    check("expert_loss", lambda: expert_loss(**{"logits": LOGITS, "target": TARGET} | options), error, message)


@pytest.mark.parametrize("case", KL)
def test_arguments_of_a_divergence(case):
    options, error, message = KL[case]
    of_both = {"logits": LOGITS, "target": TARGET} | {k: v for k, v in options.items() if k in ("logits", "target")}
    kl = {name: value for name, value in options.items() if name not in of_both}
    check("expert_kl", lambda: expert_kl(**of_both, **kl), error, message)
    check("expert_loss", lambda: expert_loss(**of_both, kl=ExpertKL(**kl)), error, message)


def test_a_gate_by_answers_needs_labels():
    check(
        "expert_kl",
        lambda: expert_kl(LOGITS, gate="teacher_correct"),
        ValueError,
        "gate 'teacher_correct' needs a target",
    )


def test_arguments_of_other_types():
    """Lists, tuples, arrays, integers and bools count as their numbers."""
    z, number = torch.randn(K, B, C), {"temperature": 2.0, "weight": 0.5}
    row, ramp = torch.arange(C), list(range(B))
    expected = expert_loss(z, TARGET, bias=row.float(), sample_weight=torch.tensor(ramp).float(), backend="cpu")
    kinds = (row, row.tolist(), tuple(row.tolist()), row.numpy(), row.double(), row.half(), [row.tolist()] * K)
    for bias in kinds:
        assert torch.equal(expert_loss(z, TARGET, bias=bias, sample_weight=ramp, backend="cpu"), expected)
    expected = expert_kl(z, **number, backend="cpu")
    for kind in (np.float32, np.float64, np.array):
        options = {name: kind(value) for name, value in number.items()}
        assert torch.equal(expert_kl(z, **options, backend="cpu"), expected)
    for kind in (torch.float32, torch.float64):  # on the device, and not read
        options = {name: torch.tensor(value, dtype=kind) for name, value in number.items()}
        torch.testing.assert_close(expert_kl(z, **options, backend="cpu"), expected)
    gate = torch.tensor([True, False, True, True])
    assert torch.equal(expert_kl(z, gate=gate, backend="cpu"), expert_kl(z, gate=gate.long(), backend="cpu"))


def test_values_are_not_read_on_another_device():
    logits, target = LOGITS.to("meta"), torch.full((B,), C, device="meta")
    options = {"target_b": target, "lam": torch.ones((), device="meta"), "class_weight": torch.ones(C, device="meta")}
    loss, terms, rows = expert_loss(
        logits, target, **options, kl=ExpertKL(gate="teacher_correct"), return_terms=True, return_rows=True
    )
    assert loss.shape == () and terms.shape == (2,) and rows.correct.shape == (K, B)
    assert expert_kl(logits.bfloat16(), "mean", temperature=torch.ones((), device="meta")).dtype == torch.float32
