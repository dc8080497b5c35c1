"""Fixtures of the op tests: golden loss cases, the backends and devices to run on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shike_fast import ops

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" not in metafunc.fixturenames:
        return
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


@pytest.fixture(params=[name for name, present in ops.backends().items() if present])
def backend(request) -> str:
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


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
