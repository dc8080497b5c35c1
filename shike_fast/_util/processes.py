"""Work shared among processes that end with the command, however it ends.

``concurrent.futures`` does not do: its workers outlive a parent that is killed, since each holds the pipe that they
wait at, and it says neither which signal ended a worker nor which of several could not be started.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

import torch

from shike_fast._util.resources import is_out_of_memory, lacking
from shike_fast.errors import RunError, ShikeError

Task = TypeVar("Task")
Tell = Callable[[int, list[str]], None]  # takes how many more items are done, and lines for the user

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_HEARTBEAT = 0.5  # seconds after which a worker without work looks whether the command still runs
_REPORTS = 0.1  # seconds between two reports of a worker


@contextlib.contextmanager
def holding_stop_signals() -> Iterator[None]:
    """Delay the stop signals; processes forked meanwhile have them delayed from their first moment on."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def how_ended(process: ForkProcess) -> str:
    """``by SIGKILL`` or ``with status 1``, of a process that has ended or is about to."""
    process.join()
    code = process.exitcode or 0
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"


def work(
    do: Callable[[Task, Tell], None],
    tasks: Sequence[Task],
    workers: int,
    report: Callable[[], contextlib.AbstractContextManager[Tell]],
) -> None:
    """Call ``do(task, tell)`` for every task, each in one of the worker processes.

    The processes are forked, so that they share what ``do`` refers to. They ignore Ctrl-C, which reaches all processes
    of a terminal, and end at the latest after the item at hand when this one has ended, by whatever signal.

    Args:
        do: the work; it calls ``tell`` after every item.
        tasks: what there is to do; a process gets the next one when it has finished one.
        workers: the most processes.
        report: makes, once they run, the function that receives the progress of all.

    Raises:
        ShikeError: the first one that a worker raised.
        RunError: a worker ended early.
    """
    remaining = iter(tasks)
    pool: dict[Connection, ForkProcess] = {}
    try:
        for number in range(min(workers, len(tasks))):
            try:
                pipe, process = _start(do)
            except OSError as error:
                raise lacking(f"cannot start worker process {number + 1} of {workers}", error) from error
            pool[pipe] = process
            _send(next(remaining), pipe, process)
        # Only now: a thread that draws a progress bar is not to be forked.
        with report() as tell:
            while pool:
                ready = wait(list(pool))
                for pipe in [pipe for pipe in pool if pipe in ready]:
                    try:
                        message = pipe.recv()
                    except (EOFError, ConnectionResetError):
                        raise _ended(pool[pipe]) from None
                    if isinstance(message, ShikeError):
                        raise message
                    if message is not None:
                        tell(*message)
                        continue
                    task = next(remaining, None)
                    _send(task, pipe, pool[pipe])
                    if task is None:
                        pool.pop(pipe).join()
    finally:
        for process in pool.values():
            process.terminate()
        for process in pool.values():
            process.join()


def _send(task: object, pipe: Connection, process: ForkProcess) -> None:
    try:
        pipe.send(task)
    except (BrokenPipeError, ConnectionResetError):
        raise _ended(process) from None


def _start(do: Callable[[Task, Tell], None]) -> tuple[Connection, ForkProcess]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with theirs:  # the only open end, so that it closes with the worker
        process = context.Process(target=_serve, args=(do, theirs, os.getpid()), daemon=True)
        try:
            # A signal between the fork and the worker's first line would be handled as in this process.
            with holding_stop_signals():
                process.start()
        except BaseException:
            ours.close()
            raise
    return ours, process


def _serve(do: Callable[[Task, Tell], None], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()  # looking for garbage among the objects of the parent would copy the pages that hold them
    torch.set_num_threads(1)  # the threads of the parent were not forked
    done, lines, last = 0, list[str](), time.monotonic()

    def flush() -> None:
        nonlocal done, lines, last
        pipe.send((done, lines))
        done, lines, last = 0, [], time.monotonic()

    def tell(count: int, new: list[str]) -> None:
        nonlocal done
        _check_parent(parent)
        done += count
        lines.extend(new)
        if time.monotonic() - last > _REPORTS:
            flush()

    try:
        for task in _tasks(pipe, parent):
            do(task, tell)
            flush()
            pipe.send(None)
    except ShikeError as error:
        flush()
        pipe.send(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        pipe.send(RunError("out of memory; use fewer --workers and repeat the command"))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the command has gone
    except OSError as error:
        what = f"cannot use {error.filename}" if error.filename else "a worker process cannot go on"
        pipe.send(lacking(what, error))


def _tasks(pipe: Connection, parent: int) -> Iterator[Any]:
    while True:
        while not pipe.poll(_HEARTBEAT):
            _check_parent(parent)
        task = pipe.recv()
        if task is None:
            return
        yield task


def _check_parent(parent: int) -> None:
    # Its pipe does not show it: the workers that were forked later hold its end as well.
    if os.getppid() != parent:
        os._exit(1)


def _ended(process: ForkProcess) -> RunError:
    how = how_ended(process)
    return RunError(
        f"a worker process ended early, {how}; if memory ran out use fewer --workers, and repeat the command"
    )
