"""All recorded cases of the published losses: values, gradients and terms."""

import json
from pathlib import Path

import numpy as np
import pytest
from recorded import evaluate

ARCHIVE = Path(__file__).parents[1] / "golden" / "methods.npz"
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def names():
    with np.load(ARCHIVE, allow_pickle=False) as archive:
        return sorted({key.rpartition("/")[0] for key in archive.files})


@pytest.fixture(scope="module")
def archive():
    with np.load(ARCHIVE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def check(archive, case, dtype, backend=None):
    fields = {key.rpartition("/")[2]: value for key, value in archive.items() if key.rpartition("/")[0] == case}
    hyper = json.loads(str(fields.pop("json")))
    results = evaluate(case.partition("/")[0], fields, hyper, backend=backend, dtype=dtype)
    assert results
    missing = [name for name in fields if name in ("loss", "weights") or name.startswith("grad")]
    assert set(missing) <= set(results)
    for name, value in results.items():
        expected = fields[name]
        assert value.shape == expected.shape, name
        if expected.dtype.kind in "bi":
            assert np.array_equal(value, expected), name
        else:
            error = np.abs(value.astype(np.float64) - expected).max()
            assert error <= TOLERANCE[dtype] * np.abs(expected).max(), (name, error, np.abs(expected).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", names())
def test_recorded(archive, case, backend, dtype):
    check(archive, case, dtype, backend)


@pytest.mark.slow
def test_recorded_with_triton(interpret):
    """A backend takes what it can; the rest runs as usual."""
    interpret(__file__, ["check_triton"])


@pytest.mark.parametrize("case", names())
def check_triton(archive, case):
    check(archive, case, "float32", "triton")
