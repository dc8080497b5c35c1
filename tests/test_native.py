"""The compiled library that is installed."""

import ast
import re
from pathlib import Path

import pytest
import torch

import shike_fast
from shike_fast.ops._native import native


def test_build_info():
    build = native().build_info()
    assert build["version"] == shike_fast.__version__
    assert re.fullmatch(r"\w+ \d+(\.\d+)+", build["compiler"])
    assert build["cxx_standard"] >= 17
    assert "-O3" in build["flags"].split()
    assert build["build_type"] == "Release"
    assert (build["cuda"] is None) == bool(build["cuda_reason"]) == (not build["cuda_architectures"])
    assert (build["cuda"] is None) == (build["cuda_flags"] is None)


def of_native(path):
    """The attributes of ``native()`` that a file names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def is_native(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "native"

    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_native(node.value)]
    names = {ast.unparse(target) for node in assigned for target in node.targets}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if is_native(node.value) or ast.unparse(node.value) in names}


def test_nothing_serves_tests_alone():
    """Each name of the library is one that the package or a benchmark uses."""
    root = Path(__file__).parents[1]
    used = set().union(
        *(of_native(path) for part in ("shike_fast", "benchmarks") for path in root.glob(f"{part}/**/*.py"))
    )
    bound = {name for name in dir(native()) if not name.startswith("__")}
    assert {"cpu_dkt_forward", "cuda_devices", "extremes"} <= bound & used
    assert bound - used == set()


def loss_call():
    logits, saved = torch.randn(2, 3, 4), torch.empty(3, 14)
    return {
        "dtype": 0,
        "shape": (2, 3, 4),
        "logits": [logits],
        "target": torch.tensor([0, 1, 2]),
        "saved": saved,
        "factors": None,
        "hardest_weight": 1.0,
        "mutual_weight": 1.0,
        "teacher_target_logit": 0.0,
        "student_target_logit": -30.0,
        "detach_teacher": False,
        "loss": torch.empty(()),
        "terms": torch.empty(3),
        "threads": 1,
    }


@pytest.mark.parametrize("missing", loss_call())
def test_a_missing_argument_is_named(missing):
    call = loss_call()
    native().cpu_dkt_forward(**dict(reversed(call.items())))  # in any order
    assert torch.isfinite(call["loss"])
    del call[missing]
    with pytest.raises(TypeError, match=f"^cpu_dkt_forward: argument '{missing}' is missing$"):
        native().cpu_dkt_forward(**call)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": torch.empty(3, 14), "saved": torch.tensor([0, 1, 2])}, "'target': expected 1 dimensions, got 2"),
        ({"loss": torch.empty(3), "terms": torch.empty(())}, "'loss': expected 0 dimensions, got 1"),
        ({"saved": 4096}, "'saved': expected a tensor, got int"),
        ({"target": None}, "'target': expected a tensor, got NoneType"),
        ({"dtype": "float32"}, "'dtype': expected an integer, got str"),
        ({"dtype": 4}, "'dtype': expected the number of a dtype, got 4"),
        ({"hardest_weight": None}, "'hardest_weight': expected a number, got NoneType"),
        ({"detach_teacher": 0.0}, "'detach_teacher': expected a bool, got float"),
        ({"shape": (2, 3)}, "'shape': expected 3 elements, got 2"),
        ({"shape": (9, 3, 4)}, "'shape': expected 1 to 8 experts, got 9"),
        ({"shape": (2, "3", 4)}, "'shape[1]': expected an integer, got str"),
        ({"logits": torch.randn(2, 3, 4)}, "'logits': expected a list, got Tensor"),
        ({"logits": [torch.randn(3, 4)] * 3}, "'logits': expected 2 elements, got 3"),
        ({"logits": [torch.randn(3, 4), torch.randn(3)]}, "'logits[1]': expected one tensor [K, B, C] or K tensors "),
        ({"logits": [torch.randn(1, 1, 1, 1, 1)]}, "'logits[0]': expected at most 4 dimensions, got 5"),
    ],
)
def test_an_argument_of_another_kind_is_named(changed, message):
    with pytest.raises(TypeError, match=f"^{re.escape(f'cpu_dkt_forward: argument {message}')}"):
        native().cpu_dkt_forward(**{**loss_call(), **changed})


def test_arguments_have_names():
    with pytest.raises(TypeError, match=r"^cpu_dkt_forward: there is no argument 'losses'$"):
        native().cpu_dkt_forward(**loss_call(), losses=1)
    with pytest.raises(TypeError, match=r"^cpu_dkt_forward: expected keyword arguments, got 14 without a name$"):
        native().cpu_dkt_forward(*loss_call().values())


def fusion_call():
    deep, shallow = ([torch.randn(2, 4, 3, 3)] * 2 for _ in range(2))
    return {
        "dtype": 0,
        "shape": (2, 4, 3, 3),
        "relu": [True, False],
        "deep": deep,
        "shallow": shallow,
        "shortcut": [],
        "weight": [torch.ones(4), None],
        "bias": [None, torch.ones(4)],
        "grad_output": torch.ones(2, 2, 4),
        "sums": torch.ones(2, 2, 2, 4),
        "vectors": torch.empty(2, 2, 4),
        "threads": 1,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"deep": [torch.randn(2, 4, 3, 3)] * 16}, "'deep': expected 2 elements, got 16"),
        ({"relu": [True] * 9}, "'relu': expected 1 to 8 elements, got 9"),
        ({"shortcut": [torch.randn(2, 4, 3, 3)]}, "'shortcut': expected 2 elements, got 1"),
        ({"shallow": [torch.randn(2, 4, 3, 3), torch.randn(4)]}, "'shallow[1]': expected 4 dimensions, got 1"),
        ({"weight": [None]}, "'weight': expected 2 elements, got 1"),
        ({"bias": [None, torch.ones(2, 2, 4)]}, "'bias[1]': expected 1 dimensions, got 3"),
        ({"sums": torch.empty(2, 2, 4), "vectors": torch.ones(2, 2, 2, 4)}, "'sums': expected 4 dimensions, got 3"),
    ],
)
def test_an_argument_of_the_fusion_is_named(changed, message):
    call = fusion_call()
    native().cpu_dkf_vector_gradients(**call)
    assert torch.allclose(call["vectors"], torch.tensor(2 / 9))  # two samples, each 1 / HW
    with pytest.raises(TypeError, match=f"^{re.escape(f'cpu_dkf_vector_gradients: argument {message}')}$"):
        native().cpu_dkf_vector_gradients(**{**call, **changed})


def test_maps_are_counted():
    maps, statistics = [torch.randn(2, 4, 3, 3)] * 17, torch.empty(17, 3, 4)
    with pytest.raises(TypeError, match="cpu_dkf_statistics: argument 'maps': expected 1 to 16 elements, got 17"):
        native().cpu_dkf_statistics(dtype=0, shape=(2, 4, 3, 3), maps=maps, statistics=statistics, threads=1)


def why_no_device():
    """Why the installed library sees no CUDA device, or None if it sees one."""
    try:
        native().cuda_devices()
    except RuntimeError as error:
        return str(error)
    return None


def test_a_device_or_the_reason_why_there_is_none():
    reason = why_no_device()
    if native().build_info()["cuda"] is None:
        assert re.match("shike_fast was built without CUDA: .", reason)
    elif not torch.cuda.is_available():
        assert re.match(r"cudaGetDeviceCount \(.*\): .*(driver|device)", reason)
    else:
        assert reason is None
        return
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        native().cuda_self_test(0)


@pytest.mark.gpu
@pytest.mark.skipif(native().build_info()["cuda"] is None, reason="the installed library was built without CUDA")
def test_devices_and_self_test():
    devices = native().cuda_devices()
    assert len(devices) == torch.cuda.device_count()
    for index, device in enumerate(devices):
        properties = torch.cuda.get_device_properties(index)
        assert device["name"] == properties.name
        assert device["compute_capability"] == (properties.major, properties.minor)
        assert device["memory_bytes"] == properties.total_memory
        assert device["driver_version"] >= device["runtime_version"] > (0, 0)
        native().cuda_self_test(index)
    with pytest.raises(RuntimeError, match=rf"expected a device number in \[0, {len(devices)}\), got {len(devices)}"):
        native().cuda_self_test(len(devices))
