"""Errors in the kernels are noticed: each of faults.py, put into the PTX."""

import pytest
from faults import FAULTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(interpreted):
    return interpreted("fault_cases", "run")


def test_nothing_is_noticed_without_a_fault(found):
    for scenario in {fault.scenario for fault in FAULTS}:
        reports, error = found[scenario]
        expected = ["never written", "trap"] if scenario == "no class" else []
        assert reports == expected and error <= 1, (scenario, reports, error)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_noticed(found, fault):
    reports, error = found[fault.name]
    if fault.noticed == "error":
        assert not error <= 1
    else:
        assert [report for report in reports if fault.noticed in report], (reports, error)
