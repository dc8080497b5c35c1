"""The loops of docs/loops.md run as they stand, and learn."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8")
LOOPS = {
    "Lightning": ("lightning",),
    "Accelerate": ("accelerate",),
    "Hugging Face Trainer": ("transformers", "accelerate"),
}
ACCURACY = re.compile(r"'(?:eval_)?(top1|few)': ([\d.]+)")


def code_of(section):
    return section.partition("```python\n")[2].partition("```\n")[0]


def sections():
    first, *rest = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)
    return code_of(first), dict(zip(rest[::2], map(code_of, rest[1::2]), strict=True))


def test_there_is_a_loop_for_each():
    common, loops = sections()
    assert "load_dataset" in common and loops.keys() == LOOPS.keys() and all(loops.values())
    assert all(15 <= code.strip().count("\n") <= 36 for code in loops.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains(programs, tmp_path, name):
    """In a separate process, without a GPU and the network; chance is right in ten percent."""
    for library in LOOPS[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    common, loops = sections()
    script = tmp_path / "loop.py"
    beginning = "import torchvision_operators\nimport torch\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\n"
    script.write_text(f"{beginning}{common}\n{loops[name]}", encoding="utf-8")
    support = str(Path(__file__).parent / "support")
    environment = {**os.environ, "PYTHONPATH": support, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = programs.run([sys.executable, script], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = {shot: float(value) for shot, value in ACCURACY.findall(done.stdout)}
    assert accuracy["top1"] > 50 and accuracy["few"] > 30, done.stdout
