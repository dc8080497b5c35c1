"""Python objects, with the arrays and tensors in them, from one process to another of the same machine.

Whatever is larger than a packet of a socket lies in an anonymous file in memory (memfd), whose descriptor is sent. Such
files need no /dev/shm, which is small in containers, and writing to one says what is lacking; a page of mapped memory
that the system cannot provide would kill the process instead.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import socket
import struct
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INLINE = 2**14  # bytes that are sent in the packet itself
_ALIGN = 64  # of each array, in bytes
_HEADER = struct.Struct("<QQ")  # bytes of all arrays, and of everything


class Closed(Exception):
    """The other process has gone, or wants no more."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection that keeps messages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, value: object) -> None:
    """Send an object.

    Raises:
        Closed: nobody reads there.
        OSError: memory, open files or the allowed size of a file do not suffice.
    """
    stream, arrays = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=arrays.append).dump(value)
    parts, spans, size = list[Any](), list[tuple[int, int]](), 0
    for raw in (array.raw() for array in arrays):
        padding = -raw.nbytes % _ALIGN
        parts += [raw, bytes(padding)]
        spans.append((size, size + raw.nbytes))
        size += raw.nbytes + padding
    parts.append(pickle.dumps((spans, stream.getvalue())))
    total = size + len(parts[-1])
    header = _HEADER.pack(size, total)
    try:
        if total <= _INLINE:
            end.send(b"".join((header, *parts)))
            return
        file = os.memfd_create("shike_fast")
        try:
            for part in parts:
                _write(file, memoryview(part))
            socket.send_fds(end, [header], [file])
        finally:
            os.close(file)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Closed from error


def receive(end: socket.socket) -> Any:
    """The next object. Its arrays lie in memory of their own, which lives as long as one of them.

    Before Python 3.13 such memory takes a file descriptor.

    Raises:
        Closed: there will be none.
        OSError: memory or open files do not suffice.
    """
    try:
        packet, files, _, _ = socket.recv_fds(end, _HEADER.size + _INLINE, 1)
    except ConnectionResetError as error:
        raise Closed from error
    if not packet:
        raise Closed
    size, total = _HEADER.unpack_from(packet)
    if files:
        try:
            memory = memoryview(_map(files[0], total))
        finally:
            os.close(files[0])
    elif total > _INLINE:  # the system drops a descriptor for which there is no room
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    else:
        memory = memoryview(bytearray(packet))[_HEADER.size :]
    spans, stream = pickle.loads(memory[size:total])
    return pickle.loads(stream, buffers=[memory[start:stop] for start, stop in spans])


def _map(file: int, size: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        return mmap.mmap(file, size, trackfd=False)
    return mmap.mmap(file, size)


def _write(file: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(file, data) :]


class _Pickler(pickle.Pickler):
    """Takes tensors for arrays of bytes, of which pickle makes no copy."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        # The order of the dimensions in memory: channels-last images arrive channels-last.
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda d: (-strides[d], d))
        plain = value.detach().permute(order).contiguous()
        content = plain.flatten().view(torch.uint8).numpy()
        return _tensor, (content, value.dtype, tuple(plain.shape), tuple(np.argsort(order).tolist()))


def _tensor(content: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(content).view(dtype).view(shape).permute(order)
