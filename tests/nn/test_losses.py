"""The losses as modules: the operator's values, options as buffers, what survives copies, compilers and devices."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch

from shike_fast import nn, ops

K, B, C = 3, 6, 5
LOGITS, TARGET = torch.randn(K, B, C, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 0])
COUNTS = [50, 20, 10, 5, 2]
PAIRS = {
    nn.DKTLoss: (ops.dkt_loss, {"hardest_weight": 3.0, "mutual_weight": np.float32(0.5), "kl_reduction": "batchmean"}),
    nn.BalancedSoftmaxLoss: (ops.balanced_softmax_loss, {"class_counts": COUNTS}),
    nn.ExpertCrossEntropyLoss: (ops.expert_cross_entropy, {"bias": np.log(COUNTS), "label_smoothing": 0.1}),
    nn.ExpertLoss: (
        ops.expert_loss,
        {
            "bias": ops.class_bias(COUNTS),
            "class_weight": torch.tensor(COUNTS),
            "reduction": "weighted_mean",
            "kl": ops.ExpertKL("mean", temperature=torch.arange(1.0, 6.0), weight=-0.2),
        },
    ),
    nn.ExpertKLLoss: (
        lambda logits, target, **options: ops.expert_kl(logits, target=target, **options),
        {"teacher": "others", "temperature": [1.0, 2.0, 1.0, 2.0, 1.0], "gate": "teacher_correct"},
    ),
}
CASES = pytest.mark.parametrize("module", PAIRS, ids=lambda module: module.__name__)


def call(loss, logits=LOGITS, target=TARGET, **options):
    return loss(logits, target=target, **options)


@CASES
def test_it_is_the_operator(module):
    operator, options = PAIRS[module]
    loss = module(**options)
    assert torch.equal(call(loss), operator(LOGITS, TARGET, **options))
    assert torch.equal(call(loss, list(LOGITS)), operator(list(LOGITS), TARGET, **options))
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), saved_and_loaded(loss)):
        assert torch.equal(call(copied), call(loss)) and repr(copied) == repr(loss)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        call(module(**options, backend="triton"))
    assert torch.equal(call(loss, backend="reference"), operator(LOGITS, TARGET, **options, backend="reference"))


def saved_and_loaded(loss):
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # a module of this test, not of a user


@CASES
def test_it_takes_the_options_of_the_operator(module):
    operator = ops.expert_kl if module is nn.ExpertKLLoss else PAIRS[module][0]
    usual = {one.name: one.default for one in inspect.signature(operator).parameters.values()}
    for name in ("logits", "target"):
        if module is not nn.ExpertKLLoss or name != "target":
            del usual[name]
    assert {one.name: one.default for one in inspect.signature(module).parameters.values()} == usual
    with pytest.raises(TypeError, match=f"^{module.__name__}: got an unexpected keyword argument 'alpha'$"):
        module(**PAIRS[module][1], alpha=1.0)


@CASES
def test_in_one_graph(module):
    loss = module(**PAIRS[module][1])
    torch.testing.assert_close(call(torch.compile(loss, backend="aot_eager", fullgraph=True)), call(loss))


def test_numbers_of_classes_are_buffers():
    loss = nn.ExpertLoss(**PAIRS[nn.ExpertLoss][1], expert_weight=(1, 2, 3), sample_weight=None)
    names = {"bias", "class_weight", "expert_weight", "kl_temperature"}
    assert dict(loss.named_buffers()).keys() == names and loss.state_dict() == {} and not list(loss.parameters())
    assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}
    assert call(loss, LOGITS.to("meta"), TARGET.to("meta")).device.type == "meta"


def test_the_callers_tensor_stays_his():
    bias = torch.zeros(C)
    loss = nn.ExpertCrossEntropyLoss(bias=bias)
    bias += torch.arange(C)
    assert torch.equal(call(loss), ops.expert_cross_entropy(LOGITS, TARGET))


def test_what_belongs_to_a_batch_is_given_with_it():
    loss = nn.ExpertLoss(scale=2.0, reduction="none")
    given = {"target_b": TARGET.flip(0), "lam": 0.3, "reduction": "mean"}
    assert torch.equal(loss(LOGITS, TARGET, **given), ops.expert_loss(LOGITS, TARGET, scale=2.0, **given))
    divergence, teacher = nn.ExpertKLLoss(temperature=2.0), torch.randn(B, C)
    assert torch.equal(divergence(LOGITS, teacher), ops.expert_kl(LOGITS, teacher, temperature=2.0))
    value, terms = nn.DKTLoss(return_terms=True)(LOGITS, TARGET)
    assert terms.shape == (3,) and torch.equal(value, nn.DKTLoss()(LOGITS, TARGET))


def test_an_option_may_change_between_calls():
    loss = nn.DKTLoss(hardest_weight=3.0)
    loss.hardest_weight = 1.0
    assert torch.equal(loss(LOGITS, TARGET), ops.dkt_loss(LOGITS, TARGET, hardest_weight=1.0))


def test_a_parameter_is_learned():
    loss = nn.ExpertCrossEntropyLoss(bias=torch.nn.Parameter(torch.zeros(C)))
    loss(LOGITS, TARGET).backward()
    assert loss.state_dict().keys() == {"bias"} and loss.bias.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"^ExpertLoss: bias must not require gradients; to learn it, pass a P"):
        nn.ExpertLoss(bias=torch.zeros(C, requires_grad=True))


def test_the_text_names_what_is_not_usual():
    assert repr(nn.DKTLoss(hardest_weight=3.0)) == "DKTLoss(hardest_weight=3.0)"
    assert repr(nn.BalancedSoftmaxLoss(COUNTS)) == "BalancedSoftmaxLoss(class_counts=float64 [5])"
    assert repr(nn.ExpertLoss(bias=torch.zeros(K, C), reduction="mean/K")) == (
        "ExpertLoss(bias=float32 [3, 5], reduction='mean/K')"
    )


def test_wrong_numbers_are_named_at_the_call():
    with pytest.raises(TypeError, match=r"^expert_loss: bias must be a tensor, list or array of numbers .*, got list$"):
        nn.ExpertLoss(bias=["a", "b"])(LOGITS, TARGET)
    with pytest.raises(TypeError, match=r"^BalancedSoftmaxLoss: missing a required argument: 'class_counts'$"):
        nn.BalancedSoftmaxLoss()
