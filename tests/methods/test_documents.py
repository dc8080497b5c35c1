"""The lines of code in docs/ops.md are the losses of the methods, and docs/methods.md names all of these."""

import re
from pathlib import Path

import pytest
import torch

from shike_fast import methods, ops

DOCS = Path(__file__).parents[2] / "docs"
COUNTS = torch.tensor([60, 40, 30, 20, 12, 8, 5, 5, 3, 2])
EPOCH = {"ride": 0}


def snippets():
    text = (DOCS / "ops.md").read_text(encoding="utf-8")
    section = text.partition("## The losses of the methods\n")[2].partition("```python\n")[2].partition("```\n")[0]
    parts = re.split(r"^# ([\w+-]+).*\n", section, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_there_are_snippets():
    assert len(snippets()) == 11 and all(1 <= code.count("\n") <= 3 for code in snippets().values())


@pytest.mark.parametrize("name", snippets())
def test_a_snippet_is_the_loss_of_its_method(name):
    torch.manual_seed(0)
    experts = methods.find_method(name).defaults.get("num_experts", 3)
    z, y = torch.randn(experts, 8, 10, dtype=torch.float64), torch.randint(10, (4,)).repeat(2)
    method = methods.create_method(name, class_counts=COUNTS, num_experts=experts)
    names = {"z": z, "y": y, "counts": COUNTS, "ops": ops, "torch": torch}
    with ops.use_backend("reference"):
        exec(snippets()[name], names)
        expected, _ = method.loss(z, y, stage=method.stages[-1], epoch=method.phase(EPOCH.get(name, 199)))
    assert torch.allclose(names["loss"], expected, rtol=1e-12)


def test_the_table_has_every_method():
    rows = re.findall(r"^\| `([\w+-]+)` \|", (DOCS / "methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows[:2] == ["shike", "ce"] and sorted(rows) == sorted(methods.list_methods())
