"""The README's promises that a machine can check."""

import re
import sys
from pathlib import Path

import pytest

from shike_fast import data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_example_runs_from_any_directory(programs, readme, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    statements = [line for line in example.splitlines() if line.strip()]
    assert len(statements) <= 10
    check = "assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith('rt_'))\n"
    done = programs.run([sys.executable, "-c", example + check], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_alone_on_their_lines(readme):
    assert "\npip install -c constraints.txt -e . && python -m shike_fast.train\n" in readme
    assert '\npip install -c constraints.txt -e ".[test]" && pytest\n' in readme


def test_every_data_set_is_in_the_table(readme):
    rows = "".join(line for line in readme.splitlines() if line.startswith("| `"))
    for name in data.datasets():
        assert f"`{name}`" in rows


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    missing = [target for target in targets if not ((ROOT / document).parent / target).exists()]
    assert not missing
