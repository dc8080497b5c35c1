"""What the tests of the kernels assert of a group of cases."""

from typing import Any


def check(result: dict[str, Any]) -> None:
    """No case has a fault, and kernels ran."""
    wrong = {name: faults for name, faults in result["faults"].items() if faults}
    assert not wrong, f"{len(wrong)} of {len(result['faults'])} cases: {dict([*wrong.items()][:5])}"
    assert result["launches"] >= len(result["faults"])
