import json
import os
import sys

import pytest

from shike_fast.data import ValidationSplit
from shike_fast.engine import rundir
from shike_fast.errors import ConfigError


def test_default_directory_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = rundir.default_directory("digits-lt", "shike")
    assert first.parts[0] == "runs"
    assert first.name.startswith("digits-lt-shike-")
    names = set()
    for _ in range(3):
        path = rundir.default_directory("digits-lt", "shike")
        path.mkdir(parents=True)
        names.add(path.name)
    assert len(names) == 3


def test_unused_accepts_absent_and_empty(tmp_path):
    rundir.check_unused(tmp_path / "absent")
    rundir.check_unused(tmp_path)


def test_unused_refuses_content_and_files(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty; add --resume"):
        rundir.check_unused(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        rundir.check_unused(tmp_path / "file")


def test_open_creates_the_directory(tmp_path):
    with rundir.open_directory(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    rundir.check_unused(tmp_path / "a" / "b")  # the lock alone does not make it used


def test_open_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"), rundir.open_directory(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX")
def test_one_process_at_a_time(programs, tmp_path):
    attempt = (
        "import sys; from pathlib import Path; from shike_fast.engine import rundir\n"
        "with rundir.open_directory(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", attempt, str(tmp_path)]
    with rundir.open_directory(tmp_path):
        refused = programs.run(command)
    assert refused.returncode == 1
    assert "another process is writing to" in refused.stderr
    assert programs.run(command).returncode == 0


def test_metrics_lines(tmp_path):
    rundir.write_metrics(tmp_path, [])
    rundir.append_metrics(tmp_path, {"epoch": 1, "few": None})
    rundir.append_metrics(tmp_path, {"epoch": 2, "few": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "few": None}, {"epoch": 2, "few": 0.5}]
    rundir.write_metrics(tmp_path, [{"epoch": 1, "few": None}])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_metrics_are_strict_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        rundir.append_metrics(tmp_path, {"train_loss": float("nan")})


def test_images_that_were_set_aside_are_listed_one_a_line(tmp_path):
    rundir.write_config(tmp_path, {"lr": 1})
    assert not (tmp_path / "validation.txt").exists()
    rundir.write_config(tmp_path, {"lr": 1}, ValidationSplit(0.1, 0, (b"a b.jpg", b"caf\xe9.jpg", b"a\nb.jpg"), 30))
    assert (tmp_path / "validation.txt").read_bytes() == b"a b.jpg\ncaf\xe9.jpg\na\\nb.jpg\n"
