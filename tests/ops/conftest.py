"""Fixtures of the op tests: golden loss cases, the backends and devices to run on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shike_fast.ops._dispatch import OPERATORS
from shike_fast.ops._native import native

GOLDEN = Path(__file__).parents[1] / "golden"


GPU_KERNELS = ("triton", "cuda")  # they have no float64
DEVICES = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"backend", "device"} <= set(metafunc.fixturenames):
        _parametrize_backend_and_device(metafunc)
    if "golden_case" in metafunc.fixturenames:
        _parametrize_golden_case(metafunc)


def _parametrize_backend_and_device(metafunc: pytest.Metafunc) -> None:
    """Every backend of the op that the module names as ``OP``, on every device that it serves."""
    pairs = [
        pytest.param(backend, torch.device(device), marks=[pytest.mark.gpu] if device == "cuda" else [])
        for backend in OPERATORS[metafunc.module.OP].backends
        for device in DEVICES[backend]
    ]
    metafunc.parametrize(("backend", "device"), pairs, ids=lambda value: str(value))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop combinations that do not exist; ``test_backend.py`` checks that they are refused."""
    items[:] = [item for item in items if not _is_refused(getattr(item, "callspec", None))]


def _is_refused(callspec) -> bool:
    params = callspec.params if callspec is not None else {}
    return params.get("backend") in GPU_KERNELS and params.get("dtype") == torch.float64


def _parametrize_golden_case(metafunc: pytest.Metafunc) -> None:
    cases = []
    for name in ("dkt_loss_small", "dkt_loss"):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            cases += sorted({(name, key.partition("/")[0]) for key in archive.files})
    metafunc.parametrize("golden_case", cases, indirect=True, ids=["-".join(case) for case in cases])


@pytest.fixture
def golden_case(request, golden):
    """One case recorded from the published code: logits, target, class_counts, and loss and gradient of both stages."""
    name, case = request.param
    fields = {key.partition("/")[2]: value for key, value in golden(name).items() if key.startswith(f"{case}/")}
    return SimpleNamespace(**{key: torch.from_numpy(value.copy()) for key, value in fields.items()})


@pytest.fixture(
    params=[*native().cpu_levels(), *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
)
def kernels(request):
    """A backend and a device: each instruction set of the CPU kernels, and each set of GPU kernels."""
    if request.param in GPU_KERNELS:
        yield request.param, torch.device("cuda")
        return
    default = native().cpu_level()
    native().set_cpu_level(request.param)
    yield "cpu", torch.device("cpu")
    native().set_cpu_level(default)


@pytest.fixture
def widest(backend) -> torch.dtype:
    """The widest dtype that the backend has kernels for."""
    return torch.float32 if backend in GPU_KERNELS else torch.float64


@pytest.fixture
def assert_golden():
    """Check a loss and its gradient against the recorded ones; every gradient entry relative to the largest."""

    def check(loss, gradient, golden_loss, golden_gradient, tolerance=None):
        if tolerance is not None:
            loss_tolerance = gradient_tolerance = tolerance
        elif loss.dtype == torch.float64:
            loss_tolerance = 1e-9
            gradient_tolerance = 1e-7 if golden_gradient.dtype == torch.float32 else 1e-9
        else:
            loss_tolerance = gradient_tolerance = 1e-5
        expected, reference = golden_loss.item(), golden_gradient.double()
        assert abs(loss.item() - expected) <= loss_tolerance * abs(expected)
        worst = (gradient.double().cpu() - reference).abs().max()
        assert worst <= gradient_tolerance * reference.abs().max()

    return check
