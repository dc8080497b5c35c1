"""Processes that load batches for the main one."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from typing import Any

import torch

from shike_fast._util.processes import STOP_SIGNALS, holding_stop_signals, how_ended
from shike_fast._util.resources import is_lacking, is_out_of_memory, keep_memory, lacking
from shike_fast.data.loaders import messages
from shike_fast.errors import RunError, ShikeError

_AHEAD = 2  # requests that a process has at a time: it never waits for the next one
_HEARTBEAT = 1.0  # seconds after which a waiting process checks that the other side is alive
_PATIENCE = 5.0  # seconds in which processes may end by themselves


class LoadingStopped(Exception):
    """Whoever waited for a batch was asked to stop."""


@dataclass
class _Worker:
    process: ForkProcess
    end: socket.socket
    asked: int = 0  # requests without an answer


class WorkerPool:
    """Forked processes that answer requests, for any number of epochs at the same time.

    They are forked whatever start method the program prefers: so they share the memory of what ``load`` refers to, and
    it need not be picklable.

    Args:
        load: answers a request; it must not refer to whatever closes this pool when it is forgotten.
        count: the number of processes.

    Raises:
        RunError: one of them cannot be started. Those before it have ended then.
    """

    def __init__(self, load: Callable[[Any], Any], count: int) -> None:
        self._owner = os.getpid()
        self._keys = itertools.count()
        self._answers: dict[int, dict[int, Any]] = {}  # those that are ahead of their turn, by epoch
        self._workers: list[_Worker] = []
        self._poll = select.poll()
        try:
            with holding_stop_signals():
                for _ in range(count):
                    self._start(load)
        except OSError as error:
            raise lacking(f"cannot start loader process {len(self._workers) + 1} of {count}", error) from error
        finally:
            if len(self._workers) < count:
                self.close()

    @property
    def processes(self) -> list[ForkProcess]:
        """The processes, as long as the pool is not closed."""
        return [worker.process for worker in self._workers]

    def _start(self, load: Callable[[Any], Any]) -> None:
        ours, theirs = messages.pair()
        with theirs:
            process = multiprocessing.get_context("fork").Process(
                target=_serve, args=(load, theirs, os.getpid()), daemon=True
            )
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        self._workers.append(_Worker(process, ours))
        self._poll.register(ours, select.POLLIN)

    def answers(self, requests: Sequence[Any], should_stop: Callable[[], bool]) -> Iterator[Any]:
        """The answers to the requests, in their order; some are worked at before it is their turn.

        Args:
            requests: what to ask.
            should_stop: is asked while an answer is being waited for.

        Raises:
            LoadingStopped: ``should_stop`` said yes.
            RunError: a process ended, or something that it needs is lacking.
            Exception: what answering raised.
        """
        key = next(self._keys)
        answers = self._answers[key] = {}
        asked = 0
        ahead = _AHEAD * len(self._workers)
        try:
            for turn in range(len(requests)):
                self._receive(0)
                while True:
                    asked = self._ask(key, requests, asked, turn + ahead + (turn in answers))
                    if turn in answers:
                        break
                    if should_stop():
                        raise LoadingStopped
                    self._receive(_HEARTBEAT)
                answer = answers.pop(turn)
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            self._answers.pop(key, None)  # answers that are still on their way are dropped

    def _ask(self, key: int, requests: Sequence[Any], asked: int, stop: int) -> int:
        """Ask requests from ``asked`` on, below ``stop``, as long as there are processes for them; returns the next."""
        while asked < min(stop, len(requests)):
            worker = min(self._workers, key=lambda worker: worker.asked, default=None)
            if worker is None:
                raise RunError("the loader was closed while an epoch of it was under way")
            if worker.asked == _AHEAD:
                break
            try:
                messages.send(worker.end, (key, asked, requests[asked]))
            except messages.Closed:
                raise self._ended(worker) from None
            except OSError as error:
                raise lacking("cannot ask a loader process for a batch", error) from error
            worker.asked += 1
            asked += 1
        return asked

    def _receive(self, seconds: float) -> None:
        """Take what the processes have sent; wait for it as long if there is nothing."""
        if not self._workers:
            raise RunError("the loader was closed while an epoch of it was under way")
        ready = {file for file, _ in self._poll.poll(1000 * seconds)}
        for worker in [worker for worker in self._workers if worker.end.fileno() in ready]:
            try:
                key, turn, answer = messages.receive(worker.end)
            except messages.Closed:
                raise self._ended(worker) from None
            except OSError as error:
                self.close()  # that answer is lost
                raise lacking("cannot take a batch from a loader process", error) from error
            worker.asked -= 1
            if key in self._answers:
                self._answers[key][turn] = answer

    def _ended(self, worker: _Worker) -> RunError:
        pid, how = worker.process.pid, how_ended(worker.process)
        self.close()
        return RunError(f"loader process {pid} ended early, {how}; memory may have run out: use fewer --workers, or 0")

    def close(self) -> None:
        """End the processes."""
        if os.getpid() != self._owner:
            return  # a copy of the pool in another forked process
        workers, self._workers = self._workers, []
        for worker in workers:
            with contextlib.suppress(OSError):  # its process has gone
                worker.end.shutdown(socket.SHUT_RDWR)
            self._poll.unregister(worker.end)
            worker.end.close()
        deadline = time.monotonic() + _PATIENCE
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():  # at a file system that does not answer, perhaps
                worker.process.kill()
                worker.process.join()


def _serve(load: Callable[[Any], Any], end: socket.socket, parent: int) -> None:
    # Ctrl-C and a batch system's SIGTERM reach the whole process group. The main process finishes its step, saves and
    # closes its loaders; a worker that died first would turn that clean exit into an error.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()  # looking for garbage among the objects of the parent would copy the pages that hold them
    torch.set_num_threads(1)  # the threads of the parent were not forked
    keep_memory()  # each batch then reuses the memory of the one before it
    poll = select.poll()
    poll.register(end, select.POLLIN)
    try:
        while True:
            # The end of the connection does not show it: processes that were forked later hold it as well.
            while not poll.poll(1000 * _HEARTBEAT):
                if os.getppid() != parent:
                    os._exit(1)
            key, turn, request = messages.receive(end)
            try:
                answer = load(request)
            except Exception as error:
                answer = _portable(error)
            try:
                messages.send(end, (key, turn, answer))
            except messages.Closed:
                raise
            except OSError as error:
                messages.send(end, (key, turn, lacking("a loader process cannot hand over its batch", error)))
            except Exception as error:  # out of memory, or what it is cannot be sent
                messages.send(end, (key, turn, _portable(error)))
    except messages.Closed:
        return
    except (OSError, MemoryError):
        os._exit(1)  # without a word: the main process says that this one has ended


def _portable(error: Exception) -> Exception:
    """What the main process is to raise for an error of a worker."""
    if isinstance(error, ShikeError):
        return error
    if is_out_of_memory(error):
        return _out_of_memory(error)
    if isinstance(error, OSError) and is_lacking(error):
        return lacking("a loader process cannot go on", error)
    error.add_note("In a loader process:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class whose constructor takes something else than what its errors keep
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _out_of_memory(error: Exception) -> RunError:
    reason = " ".join(str(error).split()) or "no details"
    return RunError(f"out of memory in a loader process ({reason}); use fewer --workers, or a smaller --batch-size")
