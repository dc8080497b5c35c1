"""The comparison of methods: a queue of runs, and one table and one picture made of those that are finished."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from shike_fast import methods, models, nn
from shike_fast.engine.config import resolve

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare.py"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it imports what is beside it
    specification = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "compare", module)  # where its dataclass looks for itself
    specification.loader.exec_module(module)
    yield module
    for name in ("results_page", "run_queue"):
        sys.modules.pop(name, None)


def entry_of(compare, method, speed, *accuracies):
    last = [{"top1": a, "many": a + 20, "medium": a, "few": None} for a in accuracies]
    origin = {"command": f"train --method {method}", "hardware": "A processor", "commit": "01234", "torch": "2"}
    return compare.Entry(method, last, list(range(len(last))), 40, 3, 461234, speed, 1.26, origin)


def test_the_table_compares_with_ce(compare):
    entries = [entry_of(compare, "ride", 400.0, 40.0, 42.0), entry_of(compare, "ce", 1000.0, 39.0)]
    head, _, ride, ce = compare.table(entries)
    assert head.startswith("| method | top-1 | many | medium | few | experts | parameters | images/s | cost | epochs")
    assert ride == (
        "| `ride` | 41.00 ± 1.41 | 61.00 ± 1.41 | 41.00 ± 1.41 | – | 3 | 461,234 | 400 | 2.50 | 40 | 1.3 | 0, 1 |"
    )
    assert ce == "| `ce` | 39.00 | 59.00 | 39.00 | – | 3 | 461,234 | 1,000 | 1.00 | 40 | 1.3 | 0 |"
    *_, alone = compare.table(entries[:1])
    assert "| 400 | – | 40 |" in alone  # nothing to compare with
    text = "\n".join(compare.document("digits-lt", entries))
    assert text.startswith("# digits-lt\n") and "](comparison.png)" in text
    assert "| `ride` | `train --method ride` | A processor | 2 | 01234 |" in text


def test_the_picture_has_a_line_for_each_method(compare, tmp_path):
    sizes = []
    for number in (1, 20):
        entries = [entry_of(compare, f"m{k}", 1.0, 40.0 + k, 42.0) for k in range(number)]
        compare.draw(tmp_path / "picture.png", "digits-lt", entries)
        content = (tmp_path / "picture.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[20:24], "big"))  # the height
    assert sizes[1] > sizes[0] + 19 * 40


def test_parameters_are_those_that_the_stages_train(compare):
    model = models.create_model("resnet8", num_classes=10, num_experts=1, fusion=False, classifier="linear")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert compare.trained_parameters(model, methods.find_method("crt").stages) == total
    assert compare.trained_parameters(model, methods.find_method("ce").stages) == total - 65 * 10
    model.rt_classifiers = nn.ScaledClassifier(model.classifiers)
    assert compare.trained_parameters(model, methods.find_method("lws").stages) == total - 65 * 10 + 10


def test_every_method_has_a_run_that_the_command_takes(compare, capsys, tmp_path):
    """What is not begun is said, and writes nothing."""
    assert compare.main(["digits-lt", "--epochs", "2", "--seeds", "2", "--runs", str(tmp_path), "--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = methods.list_methods()
    assert lines == [f"digits-lt-{name}-seed{seed}: not begun" for seed in (0, 1) for name in names]
    assert list(tmp_path.iterdir()) == []
    for name in names:
        row = compare.Row(name, "digits-lt", ("--method", name, "--epochs", "2"))
        command = compare.Run(row, 1, tmp_path, ("--model", "resnet8")).command("")
        config = resolve(vars(compare.run_queue.make_parser().parse_args(command[3:])))
        assert (config.method, config.epochs, config.seed) == (name, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "cee"), "invalid choice: 'cee'"),
        (("--seeds", "0"), "--seeds: must be at least 1, got 0"),
    ],
)
def test_bad_arguments(compare, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["digits-lt", "--runs", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_methods_by_seeds(compare, tmp_path, capfd):
    """Two methods, then a third one: what is finished is not trained again."""
    command = ["digits-lt", "--epochs", "2", "--runs", str(tmp_path), "--options", "--batch-size 32"]
    assert compare.main([*command, "--methods", "ce", "crt", "--seeds", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [row[0] for row in table] == ["`ce`", "`crt`"]
    assert all(" ± " in row[1] and row[-1] == "0, 1" for row in table)
    parameters = [int(row[6].replace(",", "")) for row in table]
    assert parameters[1] == parameters[0] + 65 * 10  # the same network, and a second classifier
    assert table[0][8] == "1.00"  # ce against itself
    rows = [
        json.loads(line)
        for seed in (0, 1)
        for line in (tmp_path / "digits-lt" / f"ce-seed{seed}" / "metrics.jsonl").open()
    ]
    last = [row["top1"] for row in rows if row["epoch"] == 2]
    assert table[0][1].startswith(f"{sum(last) / 2:.2f}")

    assert compare.main([*command, "--methods", "la", "ce", "--output", str(tmp_path / "out")]) == 0
    assert "digits-lt-ce-seed0: 2 of 2" not in capfd.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert text.index("| `la` |") < text.index("| `ce` |")
    assert "`python -m shike_fast.train --dataset digits-lt --method la --epochs 2 --batch-size 32`" in text
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "digits-lt" / "ce-seed0.sittings.jsonl").read_text().splitlines()) == 1
