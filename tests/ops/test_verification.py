"""Backends are tried in separate processes, whatever becomes of those; the fastest proven one runs."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from programs import marked

from shike_fast import ops
from shike_fast.ops import _dispatch, _verdicts, _verification
from shike_fast.ops._verdicts import CRASHED, FAILED, NOT_TRIED, PASSED, TIMED_OUT, Verdict

CPU = torch.device("cpu")
slow = pytest.mark.slow
BROKEN = Path(__file__).with_name("broken_backend.py")
LOGITS, TARGET = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)


def broken(kind):
    return [sys.executable, str(BROKEN), kind]


@pytest.fixture
def unknown(monkeypatch, tmp_path):
    """Nothing is known of any device; the folder of what is found."""
    monkeypatch.setenv("SHIKE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_verification, "_known", {})
    monkeypatch.setattr(_verification, "_told", set())
    for operator in _dispatch.OPERATORS.values():
        monkeypatch.setattr(operator, "_orders", {})
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("wrong", FAILED, r"^float32 3x5x7: gradients of input 0 err by \S+ where \S+ is allowed$"),
        pytest.param("nan", FAILED, r"^float32 3x5x7: results that are not finite$", marks=slow),
        pytest.param("not deterministic", FAILED, r"^float32 3x5x7: two runs give different results$", marks=slow),
        ("past the end", FAILED, r"^float32 3x5x7: it writes outside its outputs$"),
        ("segmentation fault", CRASHED, r"^float32 3x5x7: SIGSEGV$"),
        pytest.param("killed", CRASHED, r"^float32 3x5x7: SIGKILL$", marks=slow),
        pytest.param("exit", CRASHED, r"^float32 3x5x7: status 3: without a word$", marks=slow),
        pytest.param("out of memory", NOT_TRIED, r"^CUDA out of memory. Tried to allocate 2 GiB$", marks=slow),
        pytest.param("exception", FAILED, r"^ValueError: cannot be computed$", marks=slow),
    ],
)
def test_a_broken_backend_gets_its_verdict(kind, status, reason):
    """Operators before and after it are none the worse."""
    names = ["dkf_pool", "expert_cross_entropy", "balanced_softmax_loss"]
    found = _verification.tried("cpu", CPU, names, seconds=300, program=broken(kind))
    assert set(found) == set(names)
    assert found["expert_cross_entropy"].status == status
    assert re.search(reason, found["expert_cross_entropy"].reason), found["expert_cross_entropy"].reason
    assert found["dkf_pool"].status == found["balanced_softmax_loss"].status == PASSED


@slow
def test_an_endless_loop_ends():
    names = ["expert_cross_entropy", "dkt_loss"]
    found = _verification.tried("cpu", CPU, names, seconds=8, program=broken("forever"))  # it takes 2 s to begin
    assert found["expert_cross_entropy"] == Verdict(TIMED_OUT, "float32 3x5x7: no end within its time")
    assert found["dkt_loss"] == Verdict(NOT_TRIED, "the time was over at expert_cross_entropy")


@slow
def test_what_had_not_the_whole_time_gets_it_another_time():
    """A GPU's first trials compile with Triton; an operator that hangs is found out in the end."""
    names = ["dkt_loss", "expert_cross_entropy", "dkf_pool"]
    found = _verification.tried("cpu", CPU, names, seconds=8, program=broken("forever"))
    assert found["dkt_loss"].status == PASSED
    reason = "the time was over at float32 3x5x7: no end within its time"
    assert found["expert_cross_entropy"] == Verdict(NOT_TRIED, reason)
    assert found["dkf_pool"] == Verdict(NOT_TRIED, "the time was over at expert_cross_entropy")


def test_a_process_that_cannot_begin():
    (verdict,) = _verification.tried("cpu", CPU, ["dkt_loss"], program=["/no/such/program"]).values()
    assert verdict.status == NOT_TRIED and verdict.reason.startswith("no process can be started: ")
    (verdict,) = _verification.tried("cpu", CPU, ["dkt_loss"], program=[sys.executable, "-c", "1 / 0"]).values()
    assert verdict == Verdict(CRASHED, "its start: status 1: ZeroDivisionError: division by zero")


def test_the_backends_of_this_machine_pass(unknown):
    found = ops.verify("cpu", seconds=300)
    assert {verdict.status for verdict in found["cpu"].values()} == {PASSED}
    assert set(found["cpu"]) == {name for name, op in _dispatch.OPERATORS.items() if "cpu" in op.backends}
    assert all({"float32 small", "float32 medium"} <= set(verdict.times) for verdict in found["cpu"].values())
    for line in ops.what_runs("cpu"):
        assert re.fullmatch(r"\w+: (cpu \(verified on this CPU, .* times the reference\)|reference .*)", line)
    assert ops.verdicts()["cpu"] == found


def test_the_first_call_finds_out_and_the_next_ones_know(unknown, monkeypatch, capsys):
    started = itertools.count()
    real = _verification._process
    monkeypatch.setattr(_verification, "_process", lambda *args: next(started) or real(*args))
    assert ops.needs_verification("cpu")
    ops.dkt_loss(LOGITS, TARGET)
    ops.dkt_loss(torch.zeros(8, 64, 2048), torch.zeros(64, dtype=torch.int64))
    ops.expert_cross_entropy(LOGITS, TARGET)
    assert next(started) == 1 and not ops.needs_verification("cpu")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and re.fullmatch(r"shike_fast: verifying kernels on .+, once: \d+ s", told[0])
    assert re.match(r"shike_fast: dkt_loss: (cpu \(verified on this CPU, |reference \()", told[1])
    _verification._known.clear()  # another process
    for operator in _dispatch.OPERATORS.values():
        operator.forget()
    ops.dkt_loss(LOGITS, TARGET)
    assert next(started) == 2


@pytest.mark.parametrize("kind", ["wrong", "segmentation fault"])
def test_the_reference_runs_in_place_of_a_broken_backend(unknown, monkeypatch, kind):
    monkeypatch.setattr(_verification, "TRIALS", broken(kind))
    with pytest.warns(RuntimeWarning, match=r"expert_cross_entropy: cpu (failed|crashed) on cpu: .*; reference runs"):
        assert ops.expert_cross_entropy(LOGITS, TARGET).item() == pytest.approx(2 * 1.3862944)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        ops.expert_cross_entropy(LOGITS.bfloat16(), TARGET)
    assert _dispatch.OPERATORS["expert_cross_entropy"].choose(None, LOGITS, TARGET) == "reference"
    assert _dispatch.OPERATORS["dkt_loss"].choose(None, LOGITS, TARGET) == "cpu"
    (line,) = [line for line in ops.what_runs("cpu") if line.startswith("expert_cross_entropy: ")]
    assert re.fullmatch(r"expert_cross_entropy: reference \(cpu (failed|crashed): float32 3x5x7: .*\)", line)


def test_what_must_not_start_a_process_runs_the_reference_and_says_so_once(unknown, monkeypatch):
    monkeypatch.setenv("SHIKE_FAST_VERIFY", "off")
    with pytest.warns(RuntimeWarning, match=r"the reference runs on cpu.*SHIKE_FAST_VERIFY=off.*shike_fast.verify"):
        assert _dispatch.OPERATORS["dkt_loss"].choose(None, LOGITS, TARGET) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.OPERATORS["dkf_pool"].choose(None, torch.zeros(1, 1, 2, 2)) == "reference"
    assert not ops.needs_verification("cpu") and not unknown.exists()
    assert ops.what_runs("cpu")[0].endswith(": reference (not verified on this CPU; run python -m shike_fast.verify)")
    monkeypatch.delenv("SHIKE_FAST_VERIFY")
    monkeypatch.setattr(_verification, "_forked", True)
    assert _verification.may_verify(LOGITS) == "this is a forked process"


def test_a_compiler_meets_the_reference_until_something_is_known(unknown):
    torch.compiler.reset()
    compiled = torch.compile(ops.dkt_loss, fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match="the reference runs on cpu.*a compiler is at work"):
        first = compiled(LOGITS, TARGET)
    assert not unknown.exists()
    assert torch.isfinite(first)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("wrong", "failed"),
        *(
            pytest.param(kind, verdict, marks=slow)
            for kind, verdict in (
                ("nan", "failed"),
                ("not deterministic", "failed"),
                ("past the end", "failed"),
                ("segmentation fault", "crashed"),
                ("exit", "crashed"),
                ("forever", "timed out"),
                ("out of memory", "not tried"),
                ("exception", "failed"),
            )
        ),
    ],
)
def test_two_processes_of_a_launch_try_once(unknown, programs, tmp_path, kind, verdict):
    counted = tmp_path / "counted.py"
    counted.write_text(f"open({str(tmp_path / 'count')!r}, 'a').write('x')\nexec(open({str(BROKEN)!r}).read())\n")
    code = (
        "import sys, torch\nfrom shike_fast import ops\nfrom shike_fast.ops import _verification\n"
        f"_verification.TRIALS = [sys.executable, {str(counted)!r}, {kind!r}]\n"
        f"ops.verify('cpu', seconds={8 if kind == 'forever' else 300})\n"
        "loss = ops.expert_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64))\n"
        "assert abs(loss.item() - 2 * 1.3862944) < 1e-5\nprint(*ops.what_runs('cpu'), sep='\\n')"
    )
    both, told = [programs.start([sys.executable, "-c", code]) for _ in range(2)], []
    for done in map(programs.finish, both):
        assert done.returncode == 0, done.stderr
        if verdict == "not tried":  # which is not kept: only the process that tried knows why
            assert "expert_cross_entropy: reference (" in done.stdout
        else:
            assert re.search(rf"^expert_cross_entropy: reference \(cpu {verdict}: .+\)$", done.stdout, re.MULTILINE)
            assert f"RuntimeWarning: shike_fast: expert_cross_entropy: cpu {verdict} on cpu: " in done.stderr
        told.append("dkt_loss: cpu (verified on this CPU, " in done.stdout)
    # After an endless loop the other process of the launch tries what is left.
    assert sorted(told) == [kind != "forever", True]
    processes = {"segmentation fault": 2, "exit": 2, "out of memory": 2, "forever": 2}
    assert len((tmp_path / "count").read_text()) == processes.get(kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.8, 1.6, 2.4, 3.2])
def test_killed_at_any_moment_it_leaves_no_process_and_nothing_half(unknown, programs, seconds):
    process = programs.start([sys.executable, "-m", "shike_fast.verify", "--again", "--device", "cpu"])
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while list(marked(programs.mark)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    file = unknown / "verdicts.json"
    assert not file.exists() or json.loads(file.read_bytes())["format"] == _verdicts.FORMAT
    assert {path.name for path in unknown.glob("*")} <= {file.name, "verdicts.lock", f".{file.name}.tmp"}


def passed(own, reference, size="float32 large"):
    return Verdict(PASSED, "", {size: (own, reference)})


@pytest.mark.parametrize(
    ("verdicts", "order"),
    [
        ({"cuda": passed(1.0, 9.0), "triton": passed(2.0, 9.0)}, ("cuda", "triton", "reference")),
        ({"cuda": passed(2.0, 9.0), "triton": passed(1.0, 9.0)}, ("triton", "cuda", "reference")),
        ({"cuda": passed(1.1, 9.0), "triton": passed(1.0, 9.0)}, ("cuda", "triton", "reference")),
        ({"cuda": Verdict(FAILED, "wrong"), "triton": passed(1.0, 9.0)}, ("triton", "reference")),
        ({"cuda": passed(3.0, 1.0)}, ("reference", "cuda")),
        ({"cuda": Verdict(CRASHED, "SIGSEGV")}, ("reference",)),
        ({"cuda": passed(3.0, 1.0, "bfloat16 large")}, ("cuda", "reference")),
        ({}, ("reference",)),
    ],
)
def test_the_fastest_proven_backend_comes_first(verdicts, order):
    known = {backend: {"op": verdict} for backend, verdict in verdicts.items()}
    assert _verification.order("op", known, torch.float32, "large") == order


def test_the_nearest_size_that_was_timed_counts():
    times = {"float32 small": (3.0, 1.0), "float32 medium": (1.0, 3.0)}
    known = {"cpu": {"op": Verdict(PASSED, "", times)}}
    orders = [_verification.order("op", known, torch.float32, size)[0] for size in ("small", "medium", "large")]
    assert orders == ["reference", "cpu", "cpu"]


# ---- the file


@pytest.fixture
def verdicts():
    return {"cpu": {"dkt_loss": passed(1.0, 2.0), "dkf_pool": Verdict(CRASHED, "SIGSEGV")}}


def test_what_is_stored_is_loaded(unknown, verdicts):
    assert _verdicts.store({"device": "one"}, verdicts) is None
    assert _verdicts.store({"device": "two"}, {}) is None
    assert _verdicts.load({"device": "one"}) == verdicts
    assert _verdicts.load({"device": "two"}) == {}
    assert _verdicts.load({"device": "three"}) is None
    assert [path.name for path in unknown.iterdir()] == ["verdicts.json"]


def test_what_could_not_be_tried_is_tried_another_time(unknown, monkeypatch):
    tried = []

    def trial(backend, device, operators, **_):
        tried.append(list(operators))
        return {op: Verdict(NOT_TRIED, "no memory") if op == "dkf_pool" else passed(1.0, 2.0) for op in operators}

    monkeypatch.setattr(_verification, "tried", trial)
    found = ops.verify("cpu")
    assert found["cpu"]["dkf_pool"] == Verdict(NOT_TRIED, "no memory")
    assert "dkf_pool" not in _verdicts.load(_verdicts.machine(CPU))["cpu"]
    assert not ops.needs_verification("cpu")
    _verification._known.clear()  # another process
    assert ops.needs_verification("cpu")
    assert ops.verify("cpu")["cpu"]["dkt_loss"] == passed(1.0, 2.0)
    assert tried == [list(found["cpu"]), ["dkf_pool"]]


def test_a_first_call_tries_what_another_process_could_not(unknown, monkeypatch):
    tried = []

    def trial(backend, device, operators, **_):
        tried.append(list(operators))
        return dict.fromkeys(operators, passed(1.0, 2.0))

    monkeypatch.setattr(_verification, "tried", trial)
    known = {"cpu": {name: passed(1.0, 2.0) for name in _dispatch.OPERATORS if name != "dkf_pool"}}
    _verdicts.store(_verdicts.machine(CPU), known)
    ops.dkt_loss(LOGITS, TARGET)
    assert tried == []
    ops.dkf_pool(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert tried == [["dkf_pool"]]


def test_the_backends_of_a_gpu_share_its_time(unknown, monkeypatch):
    shares = []

    def trial(backend, device, operators, *, seconds):
        shares.append((backend, round(seconds)))
        return dict.fromkeys(operators, passed(1.0, 2.0))

    monkeypatch.setattr(_verification, "tried", trial)
    monkeypatch.setattr(_verdicts, "machine", lambda _: {"device": "a GPU"})
    operators = {"cuda": ["dkt_loss"], "triton": ["dkt_loss", "expert_logits"]}
    _verification.verify(torch.device("cuda", 0), operators, lambda *_: None)
    assert shares == [("cuda", 10), ("triton", 20)]


def test_a_backend_that_is_missing_is_not_asked_for_again_and_again(unknown, monkeypatch):
    monkeypatch.setattr(_dispatch, "_missing_on", lambda *_: "the compiled library is missing")
    assert not ops.needs_verification("cpu")
    with pytest.warns(
        RuntimeWarning, match="the reference runs on cpu: cpu not tried: the compiled library is missing"
    ):
        ops.dkt_loss(LOGITS, TARGET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.dkf_pool(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert not unknown.exists() or not (unknown / "verdicts.json").exists()  # so that each process says so


def test_old_machines_are_forgotten(unknown):
    for number in range(_verdicts.MOST_ENTRIES + 3):
        _verdicts.store({"device": str(number)}, {})
    assert _verdicts.load({"device": "2"}) is None and _verdicts.load({"device": "3"}) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": 7, "entries": []}',
        b'{"format": 1}',
        b'{"format": 1, "entries": [3]}',
    ],
)
def test_a_damaged_or_foreign_file_is_no_error(unknown, verdicts, content):
    unknown.mkdir()
    (unknown / "verdicts.json").write_bytes(content)
    assert _verdicts.load({"device": "one"}) is None
    assert _verdicts.store({"device": "one"}, verdicts) is None
    assert _verdicts.load({"device": "one"}) == verdicts


@pytest.mark.parametrize("change", [{"status": "fine"}, {"times": {"float32 small": [0, 1]}}, {"times": 3}])
def test_a_verdict_that_is_none_counts_as_unknown(unknown, verdicts, change):
    _verdicts.store({"device": "one"}, verdicts)
    content = json.loads((unknown / "verdicts.json").read_text())
    content["entries"][0]["verdicts"]["cpu"]["dkt_loss"] |= change
    (unknown / "verdicts.json").write_text(json.dumps(content))
    assert _verdicts.load({"device": "one"}) is None


def test_a_folder_that_cannot_be_made_is_no_error(unknown, verdicts, monkeypatch):
    unknown.write_text("a file")
    assert _verdicts.load({"device": "one"}) is None
    assert _verdicts.store({"device": "one"}, verdicts)
    with _verdicts.alone():
        assert unknown.is_file()
    monkeypatch.setattr(_verification, "tried", lambda *_, **__: verdicts["cpu"])
    with pytest.warns(RuntimeWarning, match="what verification found cannot be kept: "):
        assert ops.verify("cpu")["cpu"] == verdicts["cpu"]


def test_every_part_of_the_key_counts():
    found = _verdicts.machine(CPU)
    assert set(found) == {"torch", "triton", "library", "sources", "device"}
    assert found["torch"] == torch.__version__ and all(found.values())


def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("SHIKE_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _verdicts.verdict_file() == Path("/somewhere/shike_fast/verdicts.json")
    assert os.environ.get("SHIKE_FAST_CACHE") is None
