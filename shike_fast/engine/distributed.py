"""The processes that train one model together, as ``torchrun`` starts them; a process alone is a group of one."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shike_fast._util.cli import choose_device, let_first_speak
from shike_fast.errors import ConfigError, RunError, ShikeError

_T = TypeVar("_T")
_TIMEOUT = timedelta(minutes=10)  # of a process that waits for another, which may be reading its data set
_PATIENCE = timedelta(seconds=30)  # of one that waits for the first one to end with a message
_START = "start them with torchrun, or unset RANK and WORLD_SIZE to train in one process"
_LEFT = "the first process has ended"


class PeerFailed(RunError):
    """The run ends in all processes; the first one says why."""

    def __init__(self, message: str, exit_status: int = RunError.exit_status) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: its number, 0 … world_size − 1; 0 does what must be done once: files, output.
        world_size: their number.
        local_rank: its number on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' ``values``; a new tensor where there are several."""
        if not self.is_distributed:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def gather(self, value: _T) -> list[_T]:
        """All processes' values, of whatever type, in the order of their ranks. Every process has to ask."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of all processes' numbers. Every process has to ask."""
        if not self.is_distributed:
            return number
        numbers = torch.tensor(number, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def send_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers: the running statistics of its own shard."""
        if self.is_distributed:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def run_on_all(self, work: Callable[[], _T]) -> _T:
        """What ``work()`` returns here; if it fails in any process, all give up and the first one alone says why.

        Raises:
            ShikeError: in the first process, if ``work`` does here or, with the number of that process, elsewhere.
            PeerFailed: in the others, then; with the same exit status.
        """
        if not self.is_distributed:
            return work()
        result: _T | None = None
        own: ShikeError | None = None
        try:
            result = work()
        except ShikeError as caught:
            own = caught
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, None if own is None else (str(own), own.exit_status))
        failures = [(rank, *failure) for rank, failure in enumerate(told) if failure is not None]
        if not failures:
            return result  # type: ignore[return-value]  # None only where work() says so
        if own is not None and self.is_main:
            raise own
        rank, message, status = failures[0]
        if not self.is_main:
            raise PeerFailed(message, status)
        failure = RunError(f"process {rank}: {message}")
        failure.exit_status = status
        raise failure

    def broadcast_from_main(self, work: Callable[[], _T]) -> _T:
        """What ``work()`` returns in the first process, which alone calls it, handed to all by pickling.

        Raises:
            ShikeError: in the first process, if ``work`` does.
            PeerFailed: in the others, then; with the same exit status.
        """
        if not self.is_distributed:
            return work()
        box: list[Any] = [None, None]
        error: ShikeError | None = None
        if self.is_main:
            try:
                box[0] = work()
            except ShikeError as caught:
                error, box[1] = caught, caught.exit_status
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if box[1] is not None:
            raise PeerFailed("the first process could not go on", box[1])
        return box[0]


@contextlib.contextmanager
def join(device: str | None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started this one with: NCCL on GPUs, Gloo on CPUs.

    Args:
        device: what ``--device`` names.

    Raises:
        ConfigError: if the environment is contradictory, or this process does not get its own device.
        RunError: if the processes do not find each other.
    """
    processes = launched()
    if not processes.is_distributed:
        yield processes
        return
    try:
        chosen = choose_device_of(processes, device)
    except PeerFailed:
        let_first_speak()
        raise
    store = _meet(processes, chosen)
    if threading.current_thread() is threading.main_thread():
        # Nothing has to be saved yet, and a process that waits for another never comes to call a handler.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if processes.is_main:
        atexit.register(_leave, store)
    try:
        try:
            yield processes
        finally:
            # What is left of the model holds the group, too, and freed as late as the interpreter's end it aborts that.
            gc.collect()
            dist.destroy_process_group()
    except PeerFailed:
        # At the end of this process torchrun stops the others, and the first one may not have said why yet.
        with contextlib.suppress(RuntimeError):
            store.wait([_LEFT], _PATIENCE)
        raise


def launched() -> Processes:
    """This process as the environment describes it: ``torchrun`` sets RANK, WORLD_SIZE and where to meet.

    Without RANK or without WORLD_SIZE it is alone, whatever else a launcher has left behind.

    Raises:
        ConfigError: if the variables contradict each other, or no processes could find each other by them.
    """
    if not os.environ.get("RANK") or not os.environ.get("WORLD_SIZE"):
        return Processes()
    world_size = _number("WORLD_SIZE", least=1)
    if world_size == 1:
        return Processes()
    rank = _number("RANK")
    if rank >= world_size:
        raise ConfigError(f"RANK: must be less than WORLD_SIZE, which is {world_size}, got {rank}; {_START}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE says that {world_size} processes train together, but {' and '.join(missing)} must say where "
            f"they meet; {_START}"
        )
    _number("MASTER_PORT", least=1, most=65535)
    return Processes(rank, world_size, _number("LOCAL_RANK"))


def local_world_size() -> int:
    """How many processes share this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def _number(name: str, default: int = 0, *, least: int = 0, most: int | None = None) -> int:
    """A number in the environment; the default where the variable is not set, or empty."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ConfigError(
            f"{name}: must be a whole number {limits}, the environment says '{text}'; unset it, or start with torchrun"
        )
    return int(text)


def _meet(processes: Processes, device: torch.device) -> dist.Store:
    """Make the process group; returns where its members can leave messages."""
    try:
        # Restarted processes find the store of their predecessors, whose addresses in it lead nowhere (PyTorch 2.13).
        store, _, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        store = dist.PrefixStore(f"restart {_restarts()}", store)
        options: dict[str, Any] = {
            "store": store,
            "rank": processes.rank,
            "world_size": processes.world_size,
            "timeout": _TIMEOUT,
        }
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, **options)
        else:
            dist.init_process_group("gloo", **options)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"process {processes.rank} of {processes.world_size} (RANK, WORLD_SIZE) cannot meet the others at {where} "
            f"(MASTER_ADDR, MASTER_PORT): {' '.join(str(error).split())}; {_START}"
        ) from error
    return store


def _leave(store: dist.Store) -> None:
    with contextlib.suppress(RuntimeError):  # where it is kept may have gone
        store.set(_LEFT, "")


def choose_device_of(processes: Processes, name: str | None) -> torch.device:
    """The device of this process: the named one, or, of several processes, GPU number ``local_rank`` for each.

    Raises:
        ConfigError: if it is not there, or several processes would have to share it.
    """
    try:
        device = choose_device(name)
    except ConfigError as error:
        if processes.local_rank == 0:
            raise
        # True of this whole machine, whose first process says so.
        raise PeerFailed(str(error), error.exit_status) from error
    if not processes.is_distributed or device.type == "cpu":
        return device
    if name is not None and ":" in name:
        raise ConfigError(
            f"--device: {processes.world_size} processes cannot share {device}; say --device cuda, and each takes one"
        )
    count = torch.cuda.device_count()
    if processes.local_rank >= count:
        raise ConfigError(
            f"--device: process {processes.local_rank} of this machine has no GPU left, there are {count}; "
            f"start torchrun with --nproc-per-node {count}, or say --device cpu"
        )
    return torch.device("cuda", processes.local_rank)


def _restarts() -> int:
    return _number("TORCHELASTIC_RESTART_COUNT")


def launch() -> str:
    """A name for this launch of ``torchrun``, the same in all its restarts, as long as process 0 stays on its machine.

    It is made of the run's id, the machine's name and the folder that ``torchrun`` makes for the logs of one launch,
    which has a random name. It is empty without ``torchrun``.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return ""
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/attempt_N/RANK/error.json
    folder = error_file.parents[2] if len(error_file.parents) > 2 else ""
    return f"{run_id} {socket.gethostname()} {folder}"


def restarted() -> bool:
    """Whether ``torchrun`` starts these processes anew, because one of them had died."""
    return _restarts() > 0


def may_restart() -> bool:
    """Whether ``torchrun`` was asked to start the processes anew if one of them dies."""
    return _number("TORCHELASTIC_MAX_RESTARTS") > 0
