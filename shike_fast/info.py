"""``python -m shike_fast.info``: versions, devices, the compiled library, and each backend with why it is missing."""

import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shike_fast import data, methods, models, ops
from shike_fast._util.cli import ArgumentParser, run_command
from shike_fast._util.plugins import add_plugin_option, parse_with_plugins
from shike_fast._version import __version__
from shike_fast.data.images.gpu_decode import NoHardwareDecoderError, hardware_decoder
from shike_fast.ops._native import native, native_error
from shike_fast.ops._verdicts import plain


def collect() -> dict[str, Any]:
    """Gather everything that the command shows.

    Returns:
        A dictionary of plain values (it is what ``--json`` prints): ``versions``, ``threads``, ``devices`` (``cpu``;
        ``cuda`` as PyTorch and as the compiled library see it, each with a ``reason`` if it sees none), ``native``
        (``available``, ``error``, ``build``), ``images`` (``jpeg``, the decoder of the CPU; ``gpu_decoder``, None where
        JPEG can be decoded by the GPU, else why not) and ``backends`` (name -> ``available``, ``reason``,
        ``verdicts``: by device, and there by operator, what is known of it) and
        ``registered`` (``data sets``, ``methods`` and ``models``: their names).
    """
    error = native_error()
    return {
        "versions": _versions(),
        "threads": {
            "cores": os.cpu_count(),
            "torch_intra_op": torch.get_num_threads(),
            "torch_inter_op": torch.get_num_interop_threads(),
        },
        "devices": {
            "cpu": {
                "name": _cpu_name(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "kernels": native().cpu_level() if error is None else None,
            },
            "cuda": {"torch": _torch_cuda(), "native": _native_cuda()},
        },
        "native": {
            "available": error is None,
            "error": None if error is None else _describe(error),
            "build": native().build_info() if error is None else None,
        },
        "images": _images(),
        "backends": _backends(),
        "registered": {
            "data sets": list(data.datasets()),
            "methods": methods.list_methods(),
            "models": [*models.list_models(), *models.list_model_families()],
        },
    }


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    try:
        triton = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken Triton raises more than ImportError; whatever it is, it is the reason to show
        triton = f"missing: {_describe(error)}"
    return {
        "shike_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    """The processor's name. Linux keeps it in /proc/cpuinfo; what Python answers there is empty or the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def _torch_cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"version": None, "devices": [], "reason": "this PyTorch was built without CUDA"}
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return {"version": torch.version.cuda, "devices": [], "reason": str(error)}
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = [device.major, device.minor]
        devices.append({"name": device.name, "compute_capability": capability, "memory_bytes": device.total_memory})
    return {"version": torch.version.cuda, "devices": devices, "reason": None}


def _native_cuda() -> dict[str, Any]:
    """The compiled library's view; ``self_test`` is None where a kernel of this build ran, else says what failed."""
    try:
        library = native()
        devices = [dict(device) for device in library.cuda_devices()]
    except RuntimeError as error:
        return {"devices": [], "reason": str(error)}
    for index, device in enumerate(devices):
        for key in ("compute_capability", "driver_version", "runtime_version"):
            device[key] = list(device[key])
        try:
            library.cuda_self_test(index)
            device["self_test"] = None
        except RuntimeError as error:
            device["self_test"] = str(error)
    return {"devices": devices, "reason": None}


def _images() -> dict[str, Any]:
    try:
        hardware_decoder(torch.device("cuda"))
        reason = None
    except NoHardwareDecoderError as error:
        reason = str(error)
    return {"jpeg": f"simplejpeg {metadata.version('simplejpeg')}", "gpu_decoder": reason}


def _backends() -> dict[str, dict[str, Any]]:
    reasons = ops.backend_reasons()
    verdicts = {name: plain(found) for name, found in ops.verdicts().items()}
    return {
        name: {
            "available": there,
            "reason": reasons.get(name),
            "verdicts": {device: found[name] for device, found in verdicts.items() if name in found},
        }
        for name, there in ops.backends().items()
    }


def render(info: dict[str, Any]) -> str:
    """Lay out what ``collect`` returned as text.

    Args:
        info: The result of ``collect``.

    Returns:
        The text, sections of ``name  value`` lines, without a final newline.
    """
    lines = []
    for title, rows in _sections(info):
        lines.append(title)
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines)


def _sections(info: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield "versions", list(info["versions"].items())

    cpu, threads = info["devices"]["cpu"], info["threads"]
    yield (
        "devices",
        [
            ("cpu", f"{cpu['name']}, {threads['cores']} cores, {cpu['capability']}"),
            ("cpu kernels", cpu["kernels"] or "missing"),
            ("torch threads", f"{threads['torch_intra_op']} within an op, {threads['torch_inter_op']} between ops"),
            *_cuda_rows(info["devices"]["cuda"]),
        ],
    )

    build, error = info["native"]["build"], info["native"]["error"]
    yield "native library", [("missing", error)] if build is None else list(_build_rows(build))

    images = info["images"]
    gpu_decoder = "available" if images["gpu_decoder"] is None else f"missing: {images['gpu_decoder']}"
    yield "images", [("jpeg", images["jpeg"]), ("gpu decoder", gpu_decoder)]

    yield "backends of ops", list(_backend_rows(info["backends"]))
    yield "registered", [(kind, ", ".join(names)) for kind, names in info["registered"].items()]


def _backend_rows(backends: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, backend in backends.items():
        yield name, "available" if backend["available"] else f"missing: {backend['reason']}"
        for device, of_ops in backend["verdicts"].items():
            statuses: dict[str, list[str]] = {}
            for op, verdict in of_ops.items():
                statuses.setdefault(": ".join(filter(None, (verdict["status"], verdict["reason"]))), []).append(op)
            for status, names in statuses.items():
                yield "", f"on {device}, {status}: {', '.join(names)}"


def _cuda_rows(cuda: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for view in ("torch", "native"):
        if not cuda[view]["devices"]:
            yield f"cuda, {view}", f"none: {cuda[view]['reason'] or 'no device'}"
        for index, device in enumerate(cuda[view]["devices"]):
            major, minor = device["compute_capability"]
            text = f"{device['name']}, compute capability {major}.{minor}, {device['memory_bytes'] / 2**30:.1f} GiB"
            if view == "native":
                driver, runtime = (".".join(map(str, device[key])) for key in ("driver_version", "runtime_version"))
                text += f", driver for CUDA {driver}, runtime {runtime}, self test "
                text += "passed" if device["self_test"] is None else f"failed: {device['self_test']}"
            yield f"cuda:{index}, {view}", text


def _build_rows(build: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in build.items():
        if name == "cuda" and value is None:
            yield name, f"none: {build['cuda_reason']}"
        elif value and name != "cuda_reason":  # what is empty belongs to CUDA, and the row above says why
            yield name, ", ".join(value) if isinstance(value, list) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit status: 0, or 2 for an unknown option. What is missing is reported, and is no failure of this command.
    """
    return run_command(lambda: _show(argv))


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m shike_fast.info", description="Show versions, devices, backends.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_plugin_option(parser)
    return parser


def _show(argv: Sequence[str] | None) -> int:
    as_json = parse_with_plugins(_make_parser, argv)["json"]
    info = collect()
    print(json.dumps(info, indent=2) if as_json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
