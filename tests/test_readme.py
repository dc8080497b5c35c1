"""What the documents promise and a machine can check: examples, commands, links, paths, width and length."""

import re
import sys
from pathlib import Path

import pytest

from shike_fast import data

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = ("*.py", "*.h", "*.cpp", "*.cu", "*.sh")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FOLDERS = (".ci/", "benchmarks/", "csrc/", "docs/", "kernels/", "shike_fast/", "tests/")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_example_runs_from_any_directory(programs, readme, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    done = programs.run([sys.executable, "-c", example], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [word.isdecimal() for word in re.findall(r"'(\d)'", done.stdout)] == [True] * 9  # names, and twos of them


def test_the_two_commands_stand_alone_on_their_lines(readme):
    assert "\npip install -c constraints.txt -e . && python -m shike_fast.train\n" in readme
    assert '\npip install -c constraints.txt -e ".[test]" && pytest\n' in readme


def test_the_readme_is_short(readme):
    assert len(readme.splitlines()) <= 100


def test_every_data_set_is_in_the_table(readme):
    rows = "".join(line for line in readme.splitlines() if line.startswith("| `"))
    for name in data.datasets():
        assert f"`{name}`" in rows


@every_document
def test_links_lead_somewhere(document):
    missing = []
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert not missing


def anchors(document):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_paths_of_the_repository_exist(document):
    """In code spans and code blocks; capitals (NAME) stand for any name, so there the folder has to exist."""
    if document.name == "results.md":  # it names the folder that the first finished run makes
        return
    text = document.read_text()
    blocks = FENCED.findall(text) + re.findall(r"^    .*$", text, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    missing = [word for word in " ".join(blocks + spans).split() if not exists(word)]
    assert not missing


def exists(word):
    """Whether a word is no path of the repository, or one that is there; braces and asterisks as a shell reads them."""
    word = word.lstrip("(\"'").rstrip(",;:.)\"'")
    if not word.startswith(FOLDERS):
        return True
    word = word.partition("::")[0]
    braces = re.search(r"{([^{}]*)}", word)
    if braces:
        return all(exists(word.replace(braces[0], choice, 1)) for choice in braces[1].split(","))
    path = Path(*(part for part in Path(word).parts if not re.search("[A-Z]{3}", part)))
    return any(ROOT.glob(str(path)))


@every_document
def test_lines_fit(document):
    """Of tables a line is a row, which Markdown cannot wrap."""
    lines = enumerate(document.read_text().splitlines(), start=1)
    assert not [number for number, line in lines if len(line) > 120 and not line.startswith("|")]


def test_documents_that_the_sources_name_exist():
    folders = ("benchmarks", "csrc", "kernels", "shike_fast")
    files = [path for folder in folders for pattern in SOURCES for path in (ROOT / folder).rglob(pattern)]
    named = {name for path in files for name in re.findall(r"\bdocs/[\w/]+\.md", path.read_text())}
    assert named and not {name for name in named if not (ROOT / name).exists()}
