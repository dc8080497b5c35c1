"""What worker processes hold of their own, in programs that do nothing else: it depends on what the parent holds."""

import json
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).with_name("worker_memory.py")


@pytest.fixture
def run(programs):
    def run(program, *arguments):
        done = programs.run([sys.executable, PROGRAMS, program, *arguments])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_collecting_garbage_copies_nothing_of_the_main_process(run):
    used, objects = run("garbage")
    assert used < objects


@pytest.mark.slow
def test_memory_grows_neither_from_epoch_to_epoch_nor_with_the_data_set(run, image_dir):
    """Names and labels are arrays, which reading leaves shared; of Python's objects each worker would copy its own."""
    used = run("epochs", image_dir)
    assert used[-1] < used[99] + 2048  # 1.7 KiB an image; what work touches for the first time comes slowly to its end
    assert run("size", image_dir)[-1] < used[-1] + 4096  # of 20 MB
