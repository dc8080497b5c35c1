"""Ends a test session that hangs where pytest-timeout does not reach it: in C code, at collection, after a failure.

limits.py starts it. Each line that it reads, "SECONDS NAME", is what the session begins; if as many seconds pass
without another line it prints the name, has Python print where each thread is, and kills the session with all its
processes. At the end of its input, which is the session's, it kills the programs of a session that was killed.
"""

import contextlib
import os
import select
import signal
import sys
import time

from programs import descendants, kill, kill_marked

PATIENCE = 60.0  # seconds in which Python prints where each thread is


def end(session: int) -> None:
    below = set(descendants(session)) - {os.getpid()}
    with contextlib.suppress(ProcessLookupError):
        os.kill(session, signal.SIGABRT)  # pytest's faulthandler prints the stacks, and the session ends
    deadline = time.monotonic() + PATIENCE
    while os.getppid() == session and time.monotonic() < deadline:
        time.sleep(0.05)
    kill([session, *below] if os.getppid() == session else below)  # its number may be another's by now


def watch(session: int) -> None:
    name, limit, unread = "the start", None, b""
    while select.select([0], [], [], limit)[0]:
        read = os.read(0, 65536)
        if not read:
            return
        *lines, unread = (unread + read).split(b"\n")
        if lines:
            seconds, _, name = lines[-1].decode(errors="replace").partition(" ")
            limit = float(seconds)
    if os.getppid() == session:
        print(f"\n{name}: no end after {limit:g} s; this ends the session", file=sys.stderr, flush=True)
        end(session)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
    kill_marked(sys.argv[2])
