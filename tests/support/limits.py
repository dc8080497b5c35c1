"""A pytest plugin that ends a session which hangs where pytest-timeout does not reach it."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

HEAD_START = 60.0  # seconds that pytest-timeout has to let the test fail, after which the others go on


class Limits:
    """Tells the watchdog what the session begins and how long that may take."""

    def __init__(self, limit: float, mark: str) -> None:
        self.limit = limit
        command = [sys.executable, "-ES", str(Path(__file__).with_name("watchdog.py")), str(os.getpid()), mark]
        self.watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def begin(self, name: str, limit: float) -> None:
        assert self.watchdog.stdin is not None
        print(limit + HEAD_START, name, file=self.watchdog.stdin, flush=True)

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        self.begin(f"collecting {collector.nodeid}", self.limit)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        marker = item.get_closest_marker("timeout")
        self.begin(item.nodeid, self.limit if marker is None else marker.args[0])
        return (yield)

    def pytest_sessionfinish(self) -> None:
        self.begin("the end of the session", self.limit)

    def pytest_enter_pdb(self, config: pytest.Config) -> None:
        self.pytest_unconfigure()
        config.pluginmanager.unregister(self)

    def pytest_unconfigure(self) -> None:
        self.watchdog.communicate()
