"""What worker processes hold of their own, in programs that do nothing else: it depends on what the parent holds."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).with_name("worker_memory.py")


def run(program, *arguments):
    command = [sys.executable, str(PROGRAMS), program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_collecting_garbage_copies_nothing_of_the_main_process():
    used, objects = run("garbage")
    assert used < objects


def test_memory_grows_neither_from_epoch_to_epoch_nor_with_the_data_set(image_dir):
    """Names and labels are arrays, which reading leaves shared; of Python's objects each worker would copy its own."""
    used = run("epochs", image_dir)
    assert used[-1] < used[99] + 2048  # 1.7 KiB an image; what work touches for the first time comes slowly to its end
    assert run("size", image_dir)[-1] < used[-1] + 4096  # of 20 MB
