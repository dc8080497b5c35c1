"""A file of the data package imports from the floors below it, never from above, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import shike_fast

ROOT = Path(shike_fast.__file__).parent
# From the ground up. Files of one floor may import each other, but not in a circle.
FLOORS = (
    ("errors",),
    ("_util",),
    ("data.types", "data.shots", "data.longtail", "data.random", "data.recipes"),
    ("data.augment",),
    ("data.images",),
    ("data.pack",),
    ("data.registry",),
    ("data.datasets",),
    ("data.loaders",),
    ("data",),
    ("data.commands",),
    ("data.__main__",),
)


def modules():
    """The files of the data package and of what it stands on, by name without the package's."""
    found = {}
    for path in (ROOT / "errors.py", *ROOT.glob("_util/**/*.py"), *ROOT.glob("data/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path, known):
    """All modules that a file imports, wherever in it: an import within a function hides no circle."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name == "shike_fast" or not name.startswith("shike_fast."):
                continue
            name = name.removeprefix("shike_fast.")
            yield name if name in known else name.rpartition(".")[0]


def floor_of(name):
    fitting = [
        (len(room), number)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if name == room or name.startswith(f"{room}.")
    ]
    return max(fitting)[1]


def test_no_file_imports_from_above_or_from_another_package():
    known = modules()
    assert len(known) > 50
    for name, path in known.items():
        for imported in imports_of(path, known):
            assert imported in known, f"{name} imports {imported}"
            assert floor_of(imported) <= floor_of(name), f"{name} imports {imported}, which is above"


def test_no_files_form_a_circle():
    known = modules()
    graph = {name: set(imports_of(path, known)) - {name} for name, path in known.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(order) == len(known)


def test_a_circle_is_found(tmp_path):
    """Also one that an import within a function hides."""
    (tmp_path / "a.py").write_text("from shike_fast.data.b import f\n")
    (tmp_path / "b.py").write_text("def f():\n    from shike_fast.data import a\n")
    known = {"data.a": tmp_path / "a.py", "data.b": tmp_path / "b.py"}
    assert {name: set(imports_of(path, known)) for name, path in known.items()} == {
        "data.a": {"data.b"},
        "data.b": {"data.a"},
    }
