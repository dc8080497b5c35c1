"""All recorded cases of the published losses: values, gradients and terms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from recorded import evaluate

ARCHIVE = Path(__file__).parents[1] / "golden" / "methods.npz"
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def names(most=math.inf):
    """The cases whose largest array has at most so many numbers."""
    with np.load(ARCHIVE, allow_pickle=False) as archive:
        sizes = {}
        for key in archive.files:
            case = key.rpartition("/")[0]
            sizes[case] = max(archive[key].size, sizes.get(case, 0))
    return sorted(case for case, size in sizes.items() if size <= most)


def check(golden, case, dtype, backend=None):
    fields = {
        key.rpartition("/")[2]: value for key, value in golden("methods").items() if key.rpartition("/")[0] == case
    }
    hyper = json.loads(str(fields.pop("json")))
    results = evaluate(case.partition("/")[0], fields, hyper, backend=backend, dtype=dtype)
    assert results
    wanted = [name for name in fields if name in ("loss", "weights") or name.startswith("grad")]
    assert set(wanted) <= set(results)
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
def test_recorded(golden, case, backend, dtype):
    check(golden, case, dtype, backend)


@pytest.mark.slow
def test_recorded_with_triton(interpret):
    """Small cases: the interpreter is slow. The backend takes what it can; the rest runs as usual."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    interpret(__file__, ["check_triton"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, of infinities
@pytest.mark.parametrize("case", names(most=600))
def check_triton(golden, case):
    check(golden, case, "float32", "triton")
