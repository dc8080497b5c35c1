"""Builds what the interpreter runs: PTX, and the library's host code on a CUDA runtime without a GPU."""

import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pybind11

from shike_fast._version import __version__

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = {
    "losses": "losses/cuda_launch.cu",
    "experts": "losses/cuda_expert_launch.cu",
    "fusion": "fusion/cuda_launch.cu",
    "common": "common/device.cu",
}
# Without the CPU kernels: nobody calls them, and the functions that would are found only when they are called.
# In two files, for the headers and templates of pybind11 take most of the time; the two bindings use the same names.
HOST = (
    ("common/arguments.cpp", "common/bindings.cpp", "common/device.cpp", "losses/bindings.cpp"),
    ("fusion/bindings.cpp",),
)
CONFIGURATION = f"""#pragma once
#define SHIKE_WITH_CUDA 1
#define SHIKE_X86 0
namespace shike::build {{
inline constexpr char kVersion[] = "{__version__}", kCompiler[] = "", kFlags[] = "", kOpenMp[] = "", kBuildType[] = "",
                      kCudaVersion[] = "", kCudaArchitectures[] = "", kCudaFlags[] = "", kCudaReason[] = "";
}}
"""
# SHIKE_BINDINGS of csrc/common/module.h gives these two names once a file.
_PART = """\
#define shike_bindings shike_bindings_{number}
#define shike_registration shike_registration_{number}
#include "{source}"
#undef shike_bindings
#undef shike_registration
"""
Run = Callable[[Iterable[object]], CompletedProcess]


def _includes(folder: Path) -> list[str]:
    return [f"-I{place}" for place in (CSRC, folder, pybind11.get_include(), sysconfig.get_paths()["include"])]


def _nvcc(nvcc: str, architecture: str) -> list[str]:
    """The options that decide on the device code are those of a release build."""
    code = f"arch=compute_{architecture},code=compute_{architecture}"
    return [nvcc, "-std=c++17", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-w", f"-gencode={code}"]


def build_library(folder: Path, run: Run, nvcc: str) -> None:
    """libfakecuda.so, _native.so and the PTX for sm_90."""
    (folder / "build_config.h").write_text(CONFIGURATION)
    fake = folder / "libfakecuda.so"
    commands: list[list[object]] = []
    objects: list[Path] = []
    for room, source in SOURCES.items():
        keep = folder / room
        keep.mkdir()
        objects.append(folder / f"{room}.cu.o")
        command = [*_nvcc(nvcc, "90"), *_includes(folder), "--keep", "--keep-dir", keep, "-c", CSRC / source]
        commands.append([*command, "-o", objects[-1]])
    flags = ["-std=c++17", "-O0", "-w", "-fPIC", "-fvisibility=hidden", *_includes(folder)]
    for sources in HOST:
        file = folder / sources[-1].replace("/", "_")
        file.write_text("".join(_PART.format(source=source, number=number) for number, source in enumerate(sources)))
        objects.append(file.with_suffix(".o"))
        commands.append(["g++", *flags, "-c", file, "-o", objects[-1]])
    commands.append(
        ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", HERE / "fakecuda.c", "-o", fake, "-lpthread"]
    )
    _run_all(run, commands)
    link = ["g++", "-shared", *objects, fake, "-Wl,-z,lazy", f"-Wl,-rpath,{folder}", "-o", folder / "_native.so"]
    _run_all(run, [link])
    for room, source in SOURCES.items():
        (folder / room / Path(source).with_suffix(".ptx").name).rename(folder / f"{room}.90.ptx")


def build_ptx(folder: Path, run: Run, nvcc: str, architecture: str) -> None:
    """The PTX for another architecture."""
    commands = [
        [
            *_nvcc(nvcc, architecture),
            *_includes(folder),
            "-ptx",
            CSRC / source,
            "-o",
            folder / f"{room}.{architecture}.ptx",
        ]
        for room, source in SOURCES.items()
    ]
    _run_all(run, commands)


def _run_all(run: Run, commands: list[list[object]]) -> None:
    """Two at a time."""

    def work(command: list[object]) -> None:
        done = run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, commands))


if __name__ == "__main__":  # python tests/ptx/compiling.py FOLDER: for use by hand
    import os
    import shutil
    import subprocess

    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    nvcc_path = os.environ.get("CUDACXX") or shutil.which("nvcc")
    assert nvcc_path, "needs nvcc"
    build_library(target, lambda words: subprocess.run([*map(str, words)], capture_output=True, text=True), nvcc_path)
