"""The compiled library that is installed."""

import re

import pytest
import torch

import shike_fast
from shike_fast.ops._native import native


def test_build_info():
    build = native().build_info()
    assert build["version"] == shike_fast.__version__
    assert re.fullmatch(r"\w+ \d+(\.\d+)+", build["compiler"])
    assert build["cxx_standard"] >= 17
    assert "-O3" in build["flags"].split()
    assert build["build_type"] == "Release"
    assert (build["cuda"] is None) == bool(build["cuda_reason"]) == (not build["cuda_architectures"])
    assert (build["cuda"] is None) == (build["cuda_flags"] is None)


def why_no_device():
    """Why the installed library sees no CUDA device, or None if it sees one."""
    try:
        native().cuda_devices()
    except RuntimeError as error:
        return str(error)
    return None


def test_a_device_or_the_reason_why_there_is_none():
    reason = why_no_device()
    if native().build_info()["cuda"] is None:
        assert re.match("shike_fast was built without CUDA: .", reason)
    elif not torch.cuda.is_available():
        assert re.match(r"cudaGetDeviceCount \(.*\): .*(driver|device)", reason)
    else:
        assert reason is None
        return
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        native().cuda_self_test(0)


@pytest.mark.gpu
@pytest.mark.skipif(native().build_info()["cuda"] is None, reason="the installed library was built without CUDA")
def test_devices_and_self_test():
    devices = native().cuda_devices()
    assert len(devices) == torch.cuda.device_count()
    for index, device in enumerate(devices):
        properties = torch.cuda.get_device_properties(index)
        assert device["name"] == properties.name
        assert device["compute_capability"] == (properties.major, properties.minor)
        assert device["memory_bytes"] == properties.total_memory
        assert device["driver_version"] >= device["runtime_version"] > (0, 0)
        native().cuda_self_test(index)
    with pytest.raises(RuntimeError, match=rf"expected a device number in \[0, {len(devices)}\), got {len(devices)}"):
        native().cuda_self_test(len(devices))
