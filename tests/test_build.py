"""The build: sdist, wheel and editable install, and what CMake decides about CUDA.

Nothing here touches the network: the build requirements are part of the test extra. The native library is compiled
once, for the CPU only, from the unpacked sdist.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import cmake
import ninja
import pybind11
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import LIMIT

import shike_fast

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake", path=cmake.CMAKE_BIN_DIR) or shutil.which("cmake")
NINJA = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
CXX = os.environ.get("CXX", "c++")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
# More than one where the environment sees the packages of another one.
SITE_PACKAGES = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]

HOOK = "import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
PROBE = """
import importlib.util, json, shike_fast, shike_fast.kernels.losses, shike_fast._native as native
top_level = importlib.util.find_spec("kernels")
print(json.dumps({
    "version": shike_fast.__version__, "package": shike_fast.__file__, "kernels": shike_fast.kernels.losses.__file__,
    "native": native.__file__, "build": native.build_info(), "top_level_kernels": top_level and top_level.origin,
}))
"""

pytestmark = pytest.mark.timeout(2 * LIMIT)


@pytest.fixture(scope="session")
def run(programs):
    """``run(command, cwd=...)``: a finished program, whose output and errors are one text."""

    def run(command, *, env=None, check=True, **options):
        options |= {"env": os.environ | (env or {}), "stderr": subprocess.STDOUT, "limit": LIMIT}
        done = programs.run(command, **options)
        assert not check or done.returncode == 0, done.stdout
        return done

    return run


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def bare_environment(folder):
    """A virtual environment with nothing in it; its interpreter and its site-packages folder."""
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    return folder / "bin" / "python", site_packages


@pytest.fixture
def probe(run, tmp_path):
    """``probe(wheel)``: what a program finds that imports the installed wheel, and the folder this is installed in."""

    def probe(wheel):
        python, site_packages = bare_environment(tmp_path / "env")
        # The test environment's packages are seen, but no editable install of them: folders that a .pth file names are
        # searched, but .pth files in them are not run.
        (site_packages / "dependencies.pth").write_text("\n".join(SITE_PACKAGES) + "\n")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site_packages)
        (tmp_path / "elsewhere").mkdir()
        done = run([python, "-c", PROBE], cwd=tmp_path / "elsewhere", env={"PYTHONPATH": ""})
        return json.loads(done.stdout.splitlines()[-1]), site_packages

    return probe


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the build needs, with the litter of a used checkout that an sdist must leave out."""
    tree = tmp_path_factory.mktemp("checkout") / "tree"
    for folder in ("csrc", "kernels", "shike_fast"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, tree)
    for litter in ("tests/golden/large.npz", "runs/digits/last.pt", "shike_fast/_native.so", "kernels/losses/dkt.pyc"):
        (tree / litter).parent.mkdir(parents=True, exist_ok=True)
        (tree / litter).write_bytes(b"litter")
    return tree


@pytest.fixture(scope="module")
def sdist(run, tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-c", HOOK.format(hook="build_sdist"), out], cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def wheel(run, unpacked, tmp_path_factory):
    """Compiled without optimisation, which takes two thirds of the time: nothing here depends on it."""
    out = tmp_path_factory.mktemp("wheel")
    compiler = script(out / "bin" / "c++", f'exec {CXX} "$@" -O0')
    command = [sys.executable, "-m", "pip", "--isolated", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    run([*command, "-w", out, "."], cwd=unpacked, env={"SHIKE_CUDA": "0", "CXX": str(compiler)})
    (archive,) = out.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def editable(run, unpacked, wheel, tmp_path_factory):
    """An editable install's wheel; a stand-in for CMake hands out the regular wheel's library: no compilation."""
    out = tmp_path_factory.mktemp("editable")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        library = archive.extract(name, out)
    copy = f"""
        for word; do
            folder=${{word#-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=}}
            if [ "$folder" != "$word" ]; then mkdir -p "$folder" && cp '{library}' "$folder"; fi
        done"""
    cmake = script(out / "bin" / "cmake", copy)
    (out / "modules").mkdir()
    (out / "modules" / "cmake.py").touch()  # hides the package, so that the one on PATH is taken
    path = os.pathsep.join([str(cmake.parent), os.environ["PATH"]])
    env = {"PATH": path, "PYTHONPATH": str(out / "modules")}
    run([sys.executable, "-c", HOOK.format(hook="build_editable"), out], cwd=unpacked, env=env)
    (archive,) = out.glob("*.whl")
    return archive


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_sdist_contents(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        *(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "shike_fast").rglob("*.py")),
        *("CITATION.cff", "CMakeLists.txt", "LICENSE", "constraints.txt", "pyproject.toml", "setup.py"),
        "shike_fast/py.typed",
    }
    assert wanted <= names
    assert not {name for name in names if name.startswith(("tests", "runs")) or name.endswith((".so", ".pyc"))}


@pytest.mark.slow
def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"shike_fast-{shike_fast.__version__}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {
        "shike_fast",
        f"shike_fast-{shike_fast.__version__}.dist-info",
    }
    assert {"shike_fast/py.typed", "shike_fast/ops/__init__.py"} <= names
    assert {name for name in names if name.startswith("shike_fast/kernels/")} == {
        f"shike_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".so")} == {
        "shike_fast/_native" + sysconfig.get_config_var("EXT_SUFFIX")
    }
    assert "LICENSE" in {Path(name).name for name in names}
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Dist: torch>=2.10\n" in metadata


@pytest.mark.slow
def test_wheel_imports_from_another_directory(probe, wheel, tmp_path):
    found, site_packages = probe(wheel)
    assert found["version"] == found["build"]["version"] == shike_fast.__version__
    assert Path(found["package"]) == site_packages / "shike_fast" / "__init__.py"
    assert Path(found["kernels"]) == site_packages / "shike_fast" / "kernels" / "losses" / "__init__.py"
    assert Path(found["native"]).parent == site_packages / "shike_fast"
    assert not str(found["top_level_kernels"]).startswith(str(tmp_path))


@pytest.mark.slow
def test_editable_imports_from_another_directory(probe, editable, unpacked, tmp_path):
    found, _ = probe(editable)
    assert Path(found["package"]) == unpacked / "shike_fast" / "__init__.py"
    assert Path(found["kernels"]) == unpacked / "kernels" / "losses" / "__init__.py"
    assert Path(found["native"]).parent == unpacked / "shike_fast"
    assert not str(found["top_level_kernels"]).startswith((str(tmp_path), str(unpacked)))


@pytest.mark.slow
def test_build_without_cuda_says_so(run, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        library = archive.extract(name, tmp_path)
    code = (
        "import importlib.util as u, json, sys; spec = u.spec_from_file_location('_native', sys.argv[1]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(json.dumps(m.build_info()))\n"
        "for call in (m.cuda_devices, lambda: m.cuda_self_test(0)):\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)"
    )
    # -I -S: the standard library and nothing else, so the library needs no PyTorch.
    build, *errors = run([sys.executable, "-I", "-S", "-c", code, library], cwd=tmp_path).stdout.splitlines()
    build = json.loads(build)
    assert (build["cuda"], build["cuda_reason"]) == (None, "switched off by SHIKE_CUDA=0")
    assert (build["cuda_architectures"], build["cuda_flags"]) == ([], None)
    assert errors == ["shike_fast was built without CUDA: switched off by SHIKE_CUDA=0"] * 2


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {Requirement(text).name for texts in lists for text in texts} - {"shike_fast"}


def test_constraints_pin_every_requirement_but_triton():
    """PyTorch for CUDA pins the Triton that it needs: another pin could not be fulfilled together with it."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert {canonicalize_name(name) for name in requirements()} - {"triton"} <= pins.keys()
    assert "triton" not in pins
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values()), "no +cpu or other local version"
    assert pins["torch"] == "2.13.0"


def test_citation_names_this_version():
    assert f"\nversion: {shike_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# --- what CMake decides about CUDA -----------------------------------------------------------------------------------


@pytest.fixture
def configure(run, tmp_path, monkeypatch):
    """Configures, without building. Returns the exit status, the output in one line, and the generated header."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def configure(env=None, **settings):
        settings = {
            "CMAKE_MAKE_PROGRAM": NINJA,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SHIKE_VERSION": "1.2.3",
            **settings,
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        command = [CMAKE, "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", *options]
        done = run(command, env=env, check=False)
        header = tmp_path / "build" / "generated" / "build_config.h"
        return done.returncode, " ".join(done.stdout.split()), header.read_text() if header.is_file() else ""

    return configure


@pytest.fixture
def path_without_nvcc(tmp_path):
    """PATH, with links to everything but nvcc in place of the folders that hold it."""
    folders = []
    for number, folder in enumerate(Path(name) for name in os.environ["PATH"].split(os.pathsep) if name):
        if (folder / "nvcc").exists():
            links = tmp_path / f"links{number}"
            links.mkdir()
            for tool in folder.iterdir():
                if tool.name != "nvcc":
                    (links / tool.name).symlink_to(tool)
            folder = links
        folders.append(str(folder))
    return os.pathsep.join(folders)


def test_without_nvcc_auto_builds_for_the_cpu(configure, path_without_nvcc):
    status, output, header = configure({"PATH": path_without_nvcc})
    reason = "nvcc not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH and PATH)"
    assert status == 0
    assert f"building for the CPU only: {reason}" in output
    assert "#define SHIKE_WITH_CUDA 0" in header
    assert f'kCudaReason[] = R"shike({reason})shike"' in header
    assert 'kVersion[] = "1.2.3"' in header


def test_without_nvcc_cuda_required_is_an_error(configure, path_without_nvcc):
    status, output, _ = configure({"PATH": path_without_nvcc}, SHIKE_CUDA="1")
    assert status != 0
    assert "SHIKE_CUDA=1, but nvcc not found" in output


def test_broken_nvcc_auto_builds_for_the_cpu(configure, tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo 'compiling'; echo 'nvcc fatal : the toolkit is damaged' >&2; exit 1")
    status, output, header = configure({"CUDACXX": str(nvcc)})
    assert status == 0
    assert f"building for the CPU only: {nvcc} does not work: nvcc fatal : the toolkit is damaged" in output
    assert "#define SHIKE_WITH_CUDA 0" in header


def test_broken_nvcc_cuda_required_is_an_error(configure, tmp_path):
    nvcc = script(tmp_path / "bin" / "nvcc", "exit 7")  # found through CUDA_HOME, and without a word of explanation
    status, output, _ = configure({"CUDA_HOME": str(tmp_path)}, SHIKE_CUDA="1")
    assert status != 0
    assert f"SHIKE_CUDA=1, but {nvcc} does not work: exit status 7" in output


def test_nvcc_that_does_not_exist(configure, tmp_path):
    status, output, header = configure({"CUDACXX": str(tmp_path / "absent")})
    assert status == 0
    assert "absent does not work: " in output
    assert "#define SHIKE_WITH_CUDA 0" in header


def test_unknown_value_of_shike_cuda(configure):
    status, output, _ = configure(SHIKE_CUDA="maybe")
    assert status != 0
    assert 'SHIKE_CUDA must be auto, 1 or 0, got "maybe"' in output


@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "message"),
    [("9.0", '"9.0" is not an architecture; write for example "80-real;90"'), ("90-real, 1", "does not support 1; it")],
)
def test_bad_architectures(configure, archs, message):
    settings = {
        "CMAKE_CUDA_COMPILER": NVCC,
        "SHIKE_CUDA_ARCHS": archs,
    }  # a compiler that is named is not tried out: faster
    status, output, _ = configure({"CUDACXX": NVCC}, **settings)
    assert status != 0
    assert f"SHIKE_CUDA_ARCHS: {message}" in output.replace(f"{NVCC} ", "")


@needs_nvcc
@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [("9.0\\n9.0\\n", r"90"), ("99.9\\n", r"(\d+-real;)+(\d+-virtual)")],
    ids=["two present GPUs", "a GPU this nvcc does not know"],
)
def test_default_architectures(configure, capabilities, archs, tmp_path):
    script(tmp_path / "bin" / "nvidia-smi", f"printf '{capabilities}'")
    env = {"CUDACXX": NVCC, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    status, output, header = configure(env, CMAKE_CUDA_COMPILER=NVCC)
    assert status == 0, output
    assert re.search(rf'kCudaArchitectures\[\] = "{archs}";', header)
    assert "#define SHIKE_WITH_CUDA 1" in header


# --- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def build_ext(run, unpacked, tmp_path):
    """Runs setup.py where Python has only setuptools and the packages named, and PATH only the stand-ins given."""
    python, site_packages = bare_environment(tmp_path / "env")

    def build_ext(packages=(), **tools):
        for package in ("setuptools", "_distutils_hack", *packages):
            for found in (path for folder in SITE_PACKAGES for path in Path(folder).glob(f"{package}*")):
                if not (site_packages / found.name).exists():
                    (site_packages / found.name).symlink_to(found)
        (tmp_path / "bin").mkdir()
        for name, text in tools.items():
            script(tmp_path / "bin" / name, text)
        command = [python, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
        env = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": "", "SHIKE_CUDA": "0", "SHIKE_CUDA_ARCHS": "80-real;90"}
        done = run(command, cwd=unpacked, env=env, check=False)
        assert done.returncode != 0
        return done.stdout

    return build_ext


def test_missing_cmake(build_ext):
    assert "building shike_fast needs cmake: run `pip install cmake`" in build_ext()


def test_missing_ninja(build_ext):
    assert "building shike_fast needs ninja: run `pip install ninja`" in build_ext(cmake="exit 0")


def test_missing_pybind11(build_ext):
    assert "building shike_fast needs pybind11: run `pip install pybind11`" in build_ext(cmake="exit 0", ninja="exit 0")


def test_failing_cmake_from_path(build_ext):
    output = build_ext(["pybind11"], cmake='printf "<%s>" "$@"; exit 3', ninja="exit 0")
    assert "<-DSHIKE_CUDA=0><-DSHIKE_CUDA_ARCHS=80-real;90>" in output
    assert f"<-DSHIKE_VERSION={shike_fast.__version__}>" in output
    assert "building shike_fast._native failed (exit status 3)" in output


def test_build_that_produces_nothing(build_ext):
    assert "ended without producing" in build_ext(["pybind11"], cmake="exit 0", ninja="exit 0")
