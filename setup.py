"""Builds ``shike_fast._native`` with CMake and Ninja; everything else is declared in pyproject.toml."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, directory_attribute: str) -> str:
    """Path of a build tool: from the Python package of that name, which build isolation installs, else from PATH.

    The package comes first because a ``cmake`` on PATH may be the launcher of another Python environment.
    """
    if importlib.util.find_spec(name) is not None:
        directory = getattr(importlib.import_module(name), directory_attribute, None)
        path = shutil.which(name, path=directory) if directory else None
        if path:
            return path
    path = shutil.which(name)
    if path is None:
        raise SetupError(f"building shike_fast needs {name}: run `pip install {name}`")
    return path


def pybind11_directory() -> str:
    """Folder of pybind11's CMake configuration file."""
    if importlib.util.find_spec("pybind11") is None:
        raise SetupError("building shike_fast needs pybind11: run `pip install pybind11`")
    directory: str = importlib.import_module("pybind11").get_cmake_dir()
    return directory


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and leaves the library where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_directory = Path(self.build_temp).resolve() / ext.name
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            # Drop an earlier build's cache: its tools may have lived in an isolated environment now gone. Objects stay.
            "--fresh",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build_directory),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_directory()}",
            f"-DSHIKE_VERSION={self.distribution.get_version()}",
        ]
        settings = ("SHIKE_CUDA", "SHIKE_CUDA_ARCHS")
        configure += [f"-D{name}={os.environ[name]}" for name in settings if name in os.environ]
        build_directory.mkdir(parents=True, exist_ok=True)
        for command in (configure, [cmake, "--build", str(build_directory)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SetupError(
                    f"building {ext.name} failed (exit status {error.returncode}): the messages above say why. "
                    "It needs a C++17 compiler; SHIKE_CUDA=0 builds without CUDA."
                ) from None
        if not library.is_file():
            raise SetupError(f"the build of {ext.name} ended without producing {library}")


setup(
    packages=[
        *find_packages(include=["shike_fast", "shike_fast.*"]),
        "shike_fast.kernels",
        *(f"shike_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    ext_modules=[Extension("shike_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
