"""What ``import shike_fast`` brings along: the operators, and nothing that takes long to import."""

import ast
import sys

import pytest

import shike_fast

SLOW = ("torch._dynamo", "torch._inductor", "sympy", "triton", "torchmetrics", "rich", "matplotlib", "PIL", "sklearn")
LAZY = ("data", "engine", "methods", "models", "nn")


@pytest.mark.parametrize("module", ["shike_fast", "shike_fast.ops"])
def test_importing_the_operators_imports_nothing_else(programs, module):
    done = programs.run([sys.executable, "-c", f"import sys, {module}; print(sorted(sys.modules))"])
    loaded = ast.literal_eval(done.stdout)
    assert done.stderr == "" and "shike_fast.ops.dkt" in loaded
    assert not {*SLOW, *(f"shike_fast.{name}" for name in LAZY)} & {*loaded}


def test_the_operators_are_registered_by_the_import(programs):
    code = "import torch, shike_fast; print(*(getattr(torch.ops.shike_fast, n).default.name() for n in {!r}))"
    names = ("dkt_loss", "balanced_softmax_loss", "expert_cross_entropy", "dkf_pool", "dkf_bn_pool", "dkf_fused")
    done = programs.run([sys.executable, "-c", code.format(names)])
    assert done.stdout.split() == [f"shike_fast::{name}" for name in names]


def test_subpackages_are_imported_when_they_are_used(programs):
    code = "import sys, shike_fast; print(shike_fast.nn.DKTLoss.__module__, 'shike_fast.models' in sys.modules)"
    done = programs.run([sys.executable, "-c", code])
    assert done.stdout.split() == ["shike_fast.nn.losses", "False"]
    assert {*LAZY, "ops"} <= {*dir(shike_fast)} and {*LAZY, "ops"} <= {*shike_fast.__all__}
    for name in LAZY:
        assert getattr(shike_fast, name).__name__ == f"shike_fast.{name}"


def test_training_and_loading_are_functions_of_the_package(programs):
    code = "import sys, shike_fast; print('shike_fast.api' in sys.modules, callable(shike_fast.train), shike_fast.load)"
    done = programs.run([sys.executable, "-c", code])
    assert done.stdout.startswith("False True <function load") and done.stderr == ""
    assert {"train", "load"} <= {*dir(shike_fast)} and {"train", "load"} <= {*shike_fast.__all__}
    import shike_fast.train as module

    assert shike_fast.train is module and callable(module.main)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'shike_fast' has no attribute 'optics'$"):
        shike_fast.optics  # noqa: B018
