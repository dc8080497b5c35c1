"""Host code of csrc/ that only tests call, in a library of their own."""

import ctypes
import os
import shutil
from ctypes import POINTER, c_bool, c_int, c_int64
from pathlib import Path

import pytest
from programs import Programs
from shared import shared_folder

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
ARGUMENTS = {
    "loss_plan": (c_int, c_bool, c_int64, c_int64, c_int, c_bool, POINTER(c_int)),
    "resident_plan": (c_int, c_bool, c_int64, c_int64, c_int, c_int, c_int, POINTER(c_int)),
    "threads_of_classes": (c_int, c_int, c_int, c_int, c_int, POINTER(c_int)),
    "fusion_plan": (POINTER(c_int64), POINTER(c_int64), c_int, c_int, c_int, c_int, c_bool, POINTER(c_int64)),
}


@pytest.fixture(scope="session")
def plans(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of plans.cpp."""
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    with shared_folder(tmp_path_factory, "plans") as folder:
        library = folder / "plans.so"
        if not library.exists():
            unfinished = folder / "unfinished.so"
            flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
            done = programs.run([CXX, *flags, HERE / "plans.cpp", "-o", unfinished])
            assert done.returncode == 0, done.stdout + done.stderr
            unfinished.rename(library)
    loaded = ctypes.CDLL(str(library))
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded
