"""What a command line begins, resumes, branches off or refuses, given what is there."""

import contextlib
import itertools
import shutil

import pytest

from shike_fast.engine import run
from shike_fast.engine.run import Asked, Found, make_plan
from shike_fast.errors import ConfigError
from shike_fast.train import make_parser


def test_every_case_is_decided():
    possible = set(itertools.product(Asked, Found))
    possible -= {(Asked.FILE, Found.UNNAMED)}  # the directory of the file is meant
    possible -= {(Asked.RESTART, Found.UNNAMED), (Asked.RESTART, Found.NOTHING)}  # then it is like the first start
    assert run._DECISIONS.keys() == possible


@pytest.fixture
def places(tmp_path, finished):
    """A directory without and one with a run, the run's checkpoint and a copy of it under another name."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(finished / "last.pt", tmp_path / "run" / "copy.pt")
    return {"new": tmp_path / "new", "run": tmp_path / "run", "last.pt": tmp_path / "run" / "last.pt"} | {
        "copy.pt": tmp_path / "run" / "copy.pt",
        "previous": tmp_path / "run" / "last.previous.pt",
    }


CASES = [  # --resume, --output-dir, what happens
    (None, None, "begin"),
    (None, "new", "begin"),
    (None, "run", "is not empty; add --resume to go on with the run in it"),
    ("", None, "--resume: say which run with --output-dir DIR, or name its checkpoint: --resume FILE"),
    ("", "new", "new holds no checkpoint; leave --resume out or use --resume auto to start there"),
    ("", "run", "resume"),
    ("auto", None, "--resume: say which run with --output-dir DIR, or name its checkpoint: --resume FILE"),
    ("auto", "new", "begin"),
    ("auto", "run", "resume"),
    ("last.pt", None, "resume"),
    ("last.pt", "run", "resume"),
    ("last.pt", "new", "branch"),
    ("previous", None, "resume"),
    ("copy.pt", None, "is not empty"),
    ("copy.pt", "new", "branch"),
    ("new", None, "new does not exist; name an existing file"),
]


@pytest.mark.parametrize(("resume", "output_dir", "expected"), CASES)
def test_what_happens(places, resume, output_dir, expected):
    arguments = ["--resume", *([str(places.get(resume, resume))] if resume else [])] if resume is not None else []
    arguments += ["--output-dir", str(places[output_dir])] if output_dir else []
    given = vars(make_parser().parse_args(arguments))
    with contextlib.ExitStack() as held:
        if expected not in ("begin", "resume", "branch"):
            with pytest.raises(Exception, match=expected) as caught:
                make_plan(given, held)
            assert isinstance(caught.value, ConfigError) or "checkpoint" in str(caught.value)
            return
        plan = make_plan(given, held)
        assert plan.new_directory == (expected != "resume")
        assert (plan.state is None) == (expected == "begin")
        assert (plan.best_file is not None) == (expected == "branch")
        if output_dir or resume:
            assert plan.output_dir == places[output_dir or "run"]
        if plan.state is not None:
            assert plan.state["epoch"] == (2 if resume == "previous" else 3)


def test_a_file_may_have_any_name(runs, tmp_path, finished):
    """Even that of an option's value, given as a path."""
    shutil.copy(finished / "last.pt", tmp_path / "auto")
    given = vars(make_parser().parse_args(["--resume", str(tmp_path / "auto"), "--output-dir", str(tmp_path / "new")]))
    with contextlib.ExitStack() as held:
        assert make_plan(given, held).source == tmp_path / "auto"
