"""The rooms of the house: what stands on what. Imports run down, and no files import each other in a circle.

An import inside a function counts as well; one that only a type checker follows does not.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "shike_fast"

# From the ground up. A room may import from its own floor and from those below it, but not from its neighbours.
FLOORS = (
    ("errors", "_version"),
    ("_util",),
    ("ops", "data.types", "data.shots", "data.longtail", "data.random", "data.recipes"),
    ("nn", "data.augment", "data.sampling"),
    ("models", "data.images"),
    ("methods", "data.pack"),
    ("data.registry",),
    ("data.datasets", "data.loaders"),
    ("data.description",),
    ("data",),
    ("data.commands", "engine"),
    ("_full_verification",),
    ("data.__main__", "info", "verify", "api", "evaluate", "export", "predict"),
    ("train",),
    ("__main__", "__init__"),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a package is called as its folder, the package itself ``__init__``."""
    folder = ROOT / PACKAGE
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in ast.walk(node):
                child.skip = True  # type: ignore[attr-defined]
        if hasattr(node, "skip"):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] != PACKAGE:
                continue
            inner = name.removeprefix(PACKAGE).lstrip(".")
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found


def room_of(module: str) -> str:
    """The longest name among the rooms that a module's begins with."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in ROOMS:
            return name
    raise AssertionError(f"{module} is in no room: add it to FLOORS")


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(path, known) - {"_native"} for name, path in known.items()}


def test_imports_run_down(imports):
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in sorted(targets)
        if (ours := room_of(module)) != (theirs := room_of(target)) and ROOMS[theirs] >= ROOMS[ours]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files(imports):
    try:
        list(graphlib.TopologicalSorter(imports).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_circle_is_found(tmp_path):
    """Also one that an import within a function hides."""
    (tmp_path / "a.py").write_text("from shike_fast.data.b import f\n")
    (tmp_path / "b.py").write_text("def f():\n    from shike_fast.data import a\n")
    known = {"data.a": tmp_path / "a.py", "data.b": tmp_path / "b.py"}
    found = {name: imports_of(path, known) for name, path in known.items()}
    assert found == {"data.a": {"data.b"}, "data.b": {"data.a"}}


@pytest.mark.parametrize("folder", ["csrc", "kernels"])
def test_losses_and_fusion_share_only_what_is_common(folder):
    pattern = re.compile(r'^\s*(?:#include "|from shike_fast\.kernels\.)(common|losses|fusion)\b', re.MULTILINE)
    for room in ("losses", "fusion", "common"):
        files = [path for path in sorted((ROOT / folder / room).glob("*")) if path.is_file()]
        assert files or (folder, room) == ("kernels", "common")
        for path in files:
            assert set(pattern.findall(path.read_text(encoding="utf-8"))) <= {"common", room}, path


def test_csrc_emulates_nothing():
    """Kernels are run by the tests (tests/ptx), and what only tests need is built by them (tests/csrc)."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if "emulat" in path.name + path.read_text(encoding="utf-8")]


def test_no_file_is_long():
    files = [path for suffix in ("py", "h", "cpp", "cu") for path in ROOT.glob(f"*/**/*.{suffix}")]
    parts = ("csrc", "kernels", PACKAGE, "tests", "benchmarks")
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if path.relative_to(ROOT).parts[0] in parts and (lines := path.read_text(encoding="utf-8").count("\n")) > 450
    }
    assert not long
