"""``--profile``: a Chrome trace of some steps of a run, and what took the most time in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from shike_fast.engine.console import RunConsole

TRACE = "trace.json"
SKIPPED, WARM_UP, ACTIVE = 6, 1, 10  # steps; the skipped ones include a recording's warm-up
_ROWS = 10
_MOST_CHARACTERS = 120  # of a kernel's name


class Profile:
    """Profiles ten steps, from the eighth of the run on, and writes ``trace.json`` into the run's directory.

    Args:
        directory: of the run.
        console: where to print the table.
        device: where the run computes.
    """

    def __init__(self, directory: Path, console: RunConsole, device: torch.device) -> None:
        self._path = directory / TRACE
        self._console = console
        self._on_device = device.type == "cuda"
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_device else [])],
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._report,
        )
        self._steps = 0
        self._tested = False

    def between(self) -> None:
        """Note that something else than a step begins, the test of an epoch."""
        self._tested |= SKIPPED + WARM_UP <= self._steps < SKIPPED + WARM_UP + ACTIVE

    def step(self) -> None:
        """Note the end of a step."""
        if self._steps == 0:
            self._profile.start()
        self._steps += 1
        if self._steps <= SKIPPED + WARM_UP + ACTIVE:
            self._profile.step()

    def close(self) -> None:
        """End the profile; says so if the run was too short for one."""
        if self._steps > 0:
            self._profile.stop()
        if self._steps < SKIPPED + WARM_UP + ACTIVE:
            least = SKIPPED + WARM_UP + ACTIVE
            self._console.note(f"no profile: this needs {least} steps, the run had {self._steps}")

    def _report(self, result: profile) -> None:
        if self._steps < SKIPPED + WARM_UP + ACTIVE:  # ended before
            return
        result.export_chrome_trace(str(self._path))
        averages = result.key_averages()
        times = {
            row.key: (row.self_device_time_total if self._on_device else row.self_cpu_time_total, row.count)
            for row in averages
            if not row.key.startswith("ProfilerStep")
            and not row.is_user_annotation  # on a device it lasts as long as the kernels within it
            and (not self._on_device or row.device_type != torch.autograd.DeviceType.CPU)
        }
        everything = sum(time for time, _ in times.values()) or 1.0
        what = f"{ACTIVE} steps{' and the test between them' if self._tested else ''}"
        self._console.note(f"the most expensive {'kernels' if self._on_device else 'operators'} of {what}:")
        for name, (time, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:_ROWS]:
            share = f"{100 * time / everything:.1f}"
            self._console.note(f"{time / 1000:10.2f} ms {share:>5} % {calls:6} x  {name[:_MOST_CHARACTERS]}")
        self._console.note(f"trace of them: {self._path}; open it in ui.perfetto.dev or chrome://tracing")
