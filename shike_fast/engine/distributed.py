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

from shike_fast.engine.cli import choose_device, let_first_speak
from shike_fast.errors import ConfigError, RunError, ShikeError

_T = TypeVar("_T")
_TIMEOUT = timedelta(minutes=10)  # of a process that waits for another, which may be reading its data set
_PATIENCE = timedelta(seconds=30)  # of one that waits for the first one to end with a message
_LEFT = "the first process has ended"


class FailedElsewhere(RunError):
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
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' ``values``; a new tensor where there are several."""
        if not self.several:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def gather(self, value: _T) -> list[_T]:
        """All processes' values, of whatever type, in the order of their ranks. Every process has to ask."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of all processes' numbers. Every process has to ask."""
        if not self.several:
            return number
        numbers = torch.tensor(number, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def send_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers: the running statistics that it took of its own images."""
        if self.several:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def together(self, work: Callable[[], _T]) -> _T:
        """What ``work()`` returns here; if it fails in any process, all give up and the first one alone says why.

        Raises:
            ShikeError: in the first process, if ``work`` does here or, with the number of that process, elsewhere.
            FailedElsewhere: in the others, then; with the same exit status.
        """
        if not self.several:
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
        if own is not None and self.first:
            raise own
        rank, message, status = failures[0]
        if not self.first:
            raise FailedElsewhere(message, status)
        failure = RunError(f"process {rank}: {message}")
        failure.exit_status = status
        raise failure

    def from_first(self, work: Callable[[], _T]) -> _T:
        """What ``work()`` returns in the first process, which alone calls it, handed to all by pickling.

        Raises:
            ShikeError: in the first process, if ``work`` does.
            FailedElsewhere: in the others, then; with the same exit status.
        """
        if not self.several:
            return work()
        box: list[Any] = [None, None]
        error: ShikeError | None = None
        if self.first:
            try:
                box[0] = work()
            except ShikeError as caught:
                error, box[1] = caught, caught.exit_status
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if box[1] is not None:
            raise FailedElsewhere("the first process could not go on", box[1])
        return box[0]


@contextlib.contextmanager
def join(device: str | None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started this one with: NCCL on GPUs, Gloo on CPUs.

    Args:
        device: what ``--device`` names.

    Raises:
        ConfigError: if this process does not get a device of its own.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    processes = Processes(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        chosen = choose_device_of(processes, device)
    except FailedElsewhere:
        let_first_speak()
        raise
    # Restarted processes find the store of their predecessors, whose addresses in it lead nowhere (PyTorch 2.13).
    store, rank, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    store = dist.PrefixStore(f"restart {_restarts()}", store)
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": _TIMEOUT}
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen, **options)
    else:
        dist.init_process_group("gloo", **options)
    if threading.current_thread() is threading.main_thread():
        # Nothing has to be saved yet, and a process that waits for another never comes to call a handler.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if processes.first:
        atexit.register(_leave, store)
    try:
        try:
            yield processes
        finally:
            # What is left of the model holds the group, too, and freed as late as the interpreter's end it aborts that.
            gc.collect()
            dist.destroy_process_group()
    except FailedElsewhere:
        # At the end of this process torchrun stops the others, and the first one may not have said why yet.
        with contextlib.suppress(RuntimeError):
            store.wait([_LEFT], _PATIENCE)
        raise


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
        raise FailedElsewhere(str(error), error.exit_status) from error
    if not processes.several or device.type == "cpu":
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
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str:
    """A name for this launch of ``torchrun``, the same in all its restarts, as long as process 0 stays on its machine.

    An empty name without ``torchrun``.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return ""
    launcher = os.getppid()
    try:
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since the boot
    except OSError:  # not Linux
        started = ""
    return f"{run_id} {socket.gethostname()} {launcher} {started}"


def restarted() -> bool:
    """Whether ``torchrun`` starts these processes anew, because one of them had died."""
    return _restarts() > 0


def may_restart() -> bool:
    """Whether ``torchrun`` was asked to start the processes anew if one of them dies."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
