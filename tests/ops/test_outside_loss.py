"""A loss of somebody's own: one file beside those of the package makes an operator of it."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from shike_fast.ops import _dispatch

MODULE = """
import torch
from shike_fast.ops._checks import check_logits, check_target
from shike_fast.ops._losses import loss_operator

def focal_loss(logits, target, gamma=2.0, *, backend=None):
    first, shape = check_logits("focal_loss", logits)
    check_target("focal_loss", target, first, shape)
    return OPERATOR.run(backend, logits, target, gamma)

def _composite(logits, target, gamma):
    log_p = logits.log_softmax(2).gather(2, target.expand(len(logits), -1)[..., None])
    return -((1 - log_p.exp()) ** gamma * log_p).mean(1).sum()

OPERATOR = loss_operator("focal_loss", "(Tensor logits, Tensor target, float gamma) -> Tensor", _composite)
"""


@pytest.fixture(scope="module")
def focal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "focal_of_a_test.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(_dispatch, "OPERATORS", dict(_dispatch.OPERATORS))
        yield importlib.import_module("focal_of_a_test")


@pytest.fixture
def case():
    return torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 2, 2])


def test_value_and_gradient(focal, case):
    logits, target = case
    expected = sum(F.cross_entropy(expert, target) for expert in logits)
    torch.testing.assert_close(focal.focal_loss(logits, target, 0.0), expected)
    torch.testing.assert_close(focal.focal_loss(list(logits), target, 0.0), expected)
    assert torch.autograd.gradcheck(lambda z: focal.focal_loss(z, target), logits)


def test_it_is_an_operator(focal, case):
    logits, target = case
    torch.library.opcheck(torch.ops.shike_fast.focal_loss.default, (logits, target, 2.0))
    compiled = torch.compile(focal.focal_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), focal.focal_loss(logits, target))


def test_its_errors_are_those_of_all(focal, case):
    logits, target = case
    with pytest.raises(RuntimeError, match="focal_loss: backend 'cuda' cannot run: it does not implement this op"):
        focal.focal_loss(logits, target, backend="cuda")
    with pytest.raises(IndexError, match="focal_loss: "):
        focal.focal_loss(logits, target + 3)
