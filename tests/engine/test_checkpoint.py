import os
import pickle
import subprocess
import sys

import pytest
import torch

from shike_fast.engine import checkpoint
from shike_fast.engine.checkpoint import find_resumable, load_checkpoint, previous_of, save_checkpoint
from shike_fast.errors import CheckpointError


def state(value: float = 1.0) -> dict:
    return {"model": {"weight": torch.full((300,), value)}, "epoch": 3, "history": [{"top1": 50.0, "few": None}]}


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(state(), path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["weight"], torch.ones(300))
    assert loaded["history"] == [{"top1": 50.0, "few": None}]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.pt"]


def test_the_replaced_checkpoint_is_kept(tmp_path):
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(state(value), path)
    assert load_checkpoint(path)["model"]["weight"][0] == 3
    assert load_checkpoint(previous_of(path))["model"]["weight"][0] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_without_hard_links_the_replaced_checkpoint_is_kept_too(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0):
        save_checkpoint(state(value), path)
    assert load_checkpoint(previous_of(path))["model"]["weight"][0] == 1
    assert load_checkpoint(path)["model"]["weight"][0] == 2


def test_without_keep_previous_only_the_new_one_stays(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(state(1.0), path, keep_previous=False)
    save_checkpoint(state(2.0), path, keep_previous=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pt"]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pt does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "last.pt"
    save_checkpoint(state(), path)
    size = path.stat().st_size
    os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or truncated"):
        load_checkpoint(path)


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(state(), path)
    content = bytearray(path.read_bytes())
    position = content.index(torch.ones(300).numpy().tobytes()) + 600
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong CRC in record"):
        load_checkpoint(path)


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="is damaged or truncated"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_weight_file_is_no_checkpoint(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="is no checkpoint of shike_fast; for plain weights use --pretrained"):
        load_checkpoint(tmp_path / "weights.pt")


def test_another_format(tmp_path):
    torch.save({"format": 99, "model": {}}, tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="has format 99, this version of shike_fast reads format 1"):
        load_checkpoint(tmp_path / "future.pt")


def test_find_resumable_in_an_empty_directory(tmp_path):
    assert find_resumable(tmp_path) is None
    assert find_resumable(tmp_path / "absent") is None


def test_find_resumable_prefers_the_newest(tmp_path):
    save_checkpoint(state(1.0), tmp_path / "last.pt")
    save_checkpoint(state(2.0), tmp_path / "last.pt")
    path, found = find_resumable(tmp_path)
    assert path == tmp_path / "last.pt"
    assert found["model"]["weight"][0] == 2


def test_find_resumable_falls_back_to_the_previous(tmp_path):
    save_checkpoint(state(1.0), tmp_path / "last.pt")
    save_checkpoint(state(2.0), tmp_path / "last.pt")
    os.truncate(tmp_path / "last.pt", 50)
    with pytest.warns(UserWarning, match=r"last.pt is damaged.*; going on from .*last.previous.pt"):
        path, found = find_resumable(tmp_path)
    assert path == previous_of(tmp_path / "last.pt")
    assert found["model"]["weight"][0] == 1


def test_find_resumable_without_the_newest(tmp_path):
    save_checkpoint(state(1.0), tmp_path / "last.pt")
    os.replace(tmp_path / "last.pt", previous_of(tmp_path / "last.pt"))
    with pytest.warns(UserWarning, match=r"last\.pt does not exist.*; going on from .*last\.previous\.pt"):
        _, found = find_resumable(tmp_path)
    assert found["model"]["weight"][0] == 1


def test_find_resumable_never_starts_over_silently(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
        find_resumable(tmp_path)


def test_a_write_cut_short_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(state(1.0), path)

    def cut_short(content, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(state(2.0), path)
    monkeypatch.undo()
    assert load_checkpoint(path)["model"]["weight"][0] == 1
    assert (tmp_path / ".last.pt.tmp").exists()
    checkpoint.remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


_WRITE_FOREVER = """
import sys, torch
from pathlib import Path
from shike_fast.engine.checkpoint import save_checkpoint
value = 0
while True:
    value += 1
    save_checkpoint({"model": {"weight": torch.full((200_000,), float(value))}, "epoch": value}, Path(sys.argv[1]))
    print(value, flush=True)
"""


def test_killed_while_writing(tmp_path):
    """Ten kills into an endless series of writes: what is found is whole and no older than the last finished write."""
    for kill in range(10):
        directory = tmp_path / str(kill)
        directory.mkdir()
        command = [sys.executable, "-c", _WRITE_FOREVER, str(directory / "last.pt")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        written = 0
        for _ in range(2 + kill):
            written = int(process.stdout.readline())
        process.kill()
        written = int(([written, *process.stdout.read().split()])[-1])
        process.wait()
        _, found = find_resumable(directory)
        assert found["epoch"] >= written
        assert torch.equal(found["model"]["weight"], torch.full((200_000,), float(found["epoch"])))
