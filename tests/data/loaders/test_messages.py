"""Objects between processes: what arrives is what was sent, and what the system refuses is an error on the spot."""

import errno
import os
import socket
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shike_fast.data.loaders import messages


@dataclass
class Batch:
    images: torch.Tensor
    rows: np.ndarray
    name: str


@pytest.fixture
def ends():
    ends = messages.pair()
    yield ends
    for end in ends:
        end.close()


def sent(ends, value):
    messages.send(ends[0], value)
    return messages.receive(ends[1])


@pytest.mark.parametrize("side", [1, 100])  # in the packet, and in a file of its own
def test_tensors_arrive_as_they_lay_in_memory(ends, side):
    plain = torch.arange(6 * side * side).view(2, 3, side, side)
    for tensor in (
        plain,
        plain.float().contiguous(memory_format=torch.channels_last),
        plain.bfloat16(),
        plain.to(torch.uint8),
        plain > 4,
        plain[:, 1:, :, ::2],
    ):
        found = sent(ends, tensor)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        if tensor.is_contiguous(memory_format=torch.channels_last):
            assert found.is_contiguous(memory_format=torch.channels_last)
        found.zero_()  # it is the receiver's own


@pytest.mark.parametrize("tensor", [torch.tensor(3.5), torch.empty(0, 3), torch.empty(2, 0), torch.tensor([1 + 2j])])
def test_odd_tensors(ends, tensor):
    found = sent(ends, tensor)
    assert found.shape == tensor.shape and found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("size", [3, 10_000])
def test_objects_with_arrays_in_them(ends, size):
    batch = Batch(torch.ones(size, 2), np.arange(size), "däta")
    tag, found = sent(ends, ("tag", batch))
    assert (tag, found.name) == ("tag", "däta")
    assert torch.equal(found.images, batch.images)
    np.testing.assert_array_equal(found.rows, batch.rows)


def test_no_descriptor_stays_open(ends):
    before = sorted(os.listdir("/proc/self/fd"))
    kept = [sent(ends, torch.full((100, 100), i)) for i in range(20)]
    assert [int(tensor[99, 99]) for tensor in kept] == list(range(20))
    if sys.version_info < (3, 13):  # whose maps keep one
        kept.clear()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_other_one_has_gone(ends):
    ends[0].close()
    with pytest.raises(messages.Closed):
        messages.receive(ends[1])
    for value in (1, torch.zeros(100_000)):
        with pytest.raises(messages.Closed):
            messages.send(ends[1], value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.ENOMEM])
def test_no_room_for_a_message(ends, monkeypatch, number):
    def refuse(file, data):
        raise OSError(number, os.strerror(number))

    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            messages.send(ends[0], torch.zeros(100_000))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert sent(ends, "still of use") == "still of use"


def test_a_file_that_is_written_in_pieces(ends, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:1000]))
    values = torch.arange(5000)
    assert torch.equal(sent(ends, values), values)


def test_a_descriptor_that_the_receiver_has_no_room_for(ends, monkeypatch):
    receive = socket.recv_fds

    def dropped(*arguments):
        packet, files, *rest = receive(*arguments)
        os.close(*files)
        return packet, [], *rest

    monkeypatch.setattr(socket, "recv_fds", dropped)
    messages.send(ends[0], torch.zeros(100_000))
    with pytest.raises(OSError, match="Too many open files"):
        messages.receive(ends[1])
