"""The interpreter's build, once a session, and functions of the files here in separate processes.

What the interpreter cannot see: what ptxas makes of PTX (its schedule, a multiplication and an addition that it joins),
the last bits of approximate instructions, time, warps that diverge and never meet again, hazards between the lanes of a
warp in shared memory, streams and graphs, AMD's GPUs.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiling import build_library, build_ptx
from programs import Programs
from shared import shared_folder

HERE = Path(__file__).parent
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")


@pytest.fixture(scope="session")
def ptx_build(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``ptx_build("90")``: the folder with the library and, beside others, the PTX for this architecture."""

    def build(architecture: str) -> Path:
        if NVCC is None:
            pytest.skip("needs nvcc")
        with shared_folder(tmp_path_factory, "ptx") as folder:
            if not (folder / "built").exists():
                shutil.rmtree(folder)
                folder.mkdir()
                build_library(folder, programs.run, NVCC)
                (folder / "built").touch()
            if not (folder / f"built.{architecture}").exists():
                if architecture != "90":
                    build_ptx(folder, programs.run, NVCC, architecture)
                (folder / f"built.{architecture}").touch()
        return folder

    return build


@pytest.fixture(scope="session")
def interpreted(ptx_build: Callable[[str], Path], programs: Programs) -> Callable[..., Any]:
    """``interpreted("loss_cases", "matrix", seed=1)``: what a function of a file here returns.

    ``architecture``: whose PTX; ``arena``: GB of memory, most of which is never touched.
    """

    def run(file: str, function: str, *, architecture: str = "90", arena: int = 1, **arguments: Any) -> Any:
        folder = ptx_build(architecture)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(folder / "libfakecuda.so"),
            "PTX_BUILD": str(folder),
            "FAKE_ARENA_GB": str(arena),
            "OMP_NUM_THREADS": "1",
        }
        words = json.dumps({"architecture": architecture, **arguments})
        done = programs.run([sys.executable, HERE / "run.py", file, function, words], env=environment, limit=1700)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
