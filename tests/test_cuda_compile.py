"""What nvcc makes of the expert losses' kernels: registers, spills, and the width of their memory accesses."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\d+)'\n.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def cuobjdump():
    """CUDA's disassembler: nvcc's companion, or the one that Triton brings."""
    found = shutil.which("cuobjdump", path=str(Path(NVCC).parent)) or shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def readable(mangled):
    """``dkt_forward_kernel<3>`` from the name in the object file."""
    match = re.search(r"\d((?:dkt|cross_entropy)_(?:forward|backward)_kernel|sum_kernel)(?:ILi(\d)E)?", mangled)
    assert match, mangled
    return match[1] + (f"<{match[2]}>" if match[2] else "")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, tmp_path_factory):
    cubin = tmp_path_factory.mktemp("cuda") / f"expert_loss.{request.param}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-DNDEBUG", f"-arch={request.param}", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, str(CSRC / "expert_loss.cu"), "-o", str(cubin)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return cubin, done.stdout + done.stderr


def test_nothing_is_spilled(compiled, record_property):
    _, report = compiled
    kernels = {readable(match["name"]): match.groupdict() for match in RESOURCES.finditer(report)}
    assert len(kernels) == 2 * 8 + 3, report
    for name, kernel in kernels.items():
        table = ", ".join(f"{kernel[key]} {key}" for key in ("registers", "stack", "stores", "loads"))
        record_property(f"{kernel['architecture']} {name}", table)
        experts = int(name[-2]) if name.endswith(">") else 1
        if experts <= 4:
            assert kernel["stores"] == kernel["loads"] == "0", (name, table)


def test_accesses_are_wide(compiled):
    cubin, _ = compiled
    tool = cuobjdump()
    assert tool is not None, "nvcc brings cuobjdump along, and so does Triton"
    done = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code = {}
    for function in done.stdout.split("Function : ")[1:]:
        code[readable(function.split("\n", 1)[0])] = function
    assert re.search(r"\bLDG\.E\.128\b", code["dkt_forward_kernel<3>"])
    assert re.search(r"\bLDG\.E\.128\b", code["dkt_backward_kernel<3>"])
    assert re.search(r"\bSTG\.E\.128\b", code["dkt_backward_kernel<3>"])
    assert re.search(r"\bLDG\.E\.128\b", code["cross_entropy_forward_kernel"])
    assert re.search(r"\bSTG\.E\.128\b", code["cross_entropy_backward_kernel"])
    for name, text in code.items():  # arrays in local memory would be slow
        if name != "sum_kernel" and not re.search(r"<[5-8]>", name):
            assert not re.search(r"\b(LDL|STL)\b", text), name
