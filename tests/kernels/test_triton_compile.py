"""The Triton kernels of the expert losses compile ahead of time for NVIDIA and AMD GPUs, without spilling registers.

No GPU is needed: the launches of the public functions are recorded and compiled, specialised as Triton would do it.
"""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from shike_fast.kernels import _rows, cross_entropy, dkt  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHAPES = [(1, 8142), (3, 8142), (4, 8142), (8, 8142), (3, 100), (4, 1000)]  # a loop of blocks; one block
KERNELS = [
    value
    for module in (_rows, cross_entropy, dkt)
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def launches(monkeypatch):
    """Instead of launching, every kernel appends (kernel, arguments, keyword arguments) to this list."""
    recorded = []
    for kernel in KERNELS:
        monkeypatch.setattr(
            kernel,
            "run",
            lambda *args, grid, warmup, kernel=kernel, **kwargs: recorded.append((kernel, args, kwargs)),
            raising=False,
        )
    return recorded


def compiled(kernel, args, kwargs, target):
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def registers(binary, path):
    """(registers a thread, spills): bytes of the stack on NVIDIA, spilled registers on AMD."""
    if "cubin" in binary.asm:
        path.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(used), int(stack)
    count = {
        key: int(re.search(rf"\.{key}:\s+(\d+)", binary.asm["amdgcn"]).group(1))
        for key in ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    return count["vgpr_count"] + count["agpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("experts", "classes"), SHAPES)
def test_compiles_without_spilling(experts, classes, dtype, target, launches, tmp_path, record_property):
    logits, labels = [torch.zeros(experts, 128, classes, dtype=dtype)], torch.zeros(128, dtype=torch.int64)
    options = (10.0, 1.0, "mean", 0.0, -30.0, False)
    one, bias = torch.ones(()), torch.zeros(classes)
    factors = torch.ones(2, dtype=torch.float64) if dtype == torch.float32 else None
    _, _, state = dkt.dkt_forward(logits, labels, factors, *options)
    dkt.dkt_backward(one, logits, labels, factors, state, *options)
    _, state = cross_entropy.cross_entropy_forward(logits, labels, bias, 0.1)
    cross_entropy.cross_entropy_backward(one, logits, labels, bias, state, 0.1)
    assert {kernel for kernel, _, _ in launches} == set(KERNELS) and len(KERNELS) == 5
    for kernel, args, kwargs in launches:
        binary = compiled(kernel, args, kwargs, TARGETS[target])
        used, spilled = registers(binary, tmp_path / "kernel.cubin")
        record_property(
            f"{kernel.__module__}{kernel.__name__} K={experts} C={classes} {dtype} {target}",
            f"BLOCK={kwargs['BLOCK']} warps={kwargs['num_warps']} registers={used} spills={spilled}",
        )
        assert spilled == 0 or experts > 4, (kernel.__name__, used, spilled)


@pytest.mark.parametrize("target", TARGETS)
def test_other_layouts_compile(target, launches):
    transposed = torch.zeros(16, 8142, 3, dtype=torch.float16).permute(2, 0, 1)
    apart = [torch.zeros(16, 8143, dtype=torch.float16)[:, 1:] for _ in range(2)]  # not aligned to 16 bytes
    labels = torch.zeros(32, dtype=torch.int64)[::2]
    options, one = (10.0, 1.0, "batchmean", 0.0, -30.0, True), torch.ones(())
    for logits in ([transposed], apart):
        _, _, state = dkt.dkt_forward(logits, labels, None, *options)
        dkt.dkt_backward(one, logits, labels, None, state, *options)
        _, state = cross_entropy.cross_entropy_forward(logits, labels, None, 0.0)
        cross_entropy.cross_entropy_backward(one, logits, labels, None, state, 0.0)
    for launch in launches:
        compiled(*launch, TARGETS[target])


def test_wide_loads_of_odd_rows(launches):
    # Rows of 100 classes start at multiples of 8 bytes in bfloat16: a thread loads four classes at once.
    logits, labels = [torch.zeros(3, 8, 100, dtype=torch.bfloat16)], torch.zeros(8, dtype=torch.int64)
    dkt.dkt_forward(logits, labels, None, 10.0, 1.0, "mean", 0.0, -30.0, False)
    ptx = compiled(*launches[0], TARGETS["sm_90"]).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v2\.b32", ptx)) == 3


def test_unused_terms_cost_nothing(launches):
    logits, labels = [torch.zeros(3, 8, 100)], torch.zeros(8, dtype=torch.int64)
    for weights in ((10.0, 1.0), (10.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        dkt.dkt_forward(logits, labels, None, *weights, "mean", 0.0, -30.0, False)
    sizes = [
        compiled(*launch, TARGETS["sm_90"]).asm["ptx"].count("\n")
        for launch in launches
        if launch[0] is dkt._forward_kernel
    ]
    assert sizes[3] < min(sizes[1:3]) and max(sizes[1:3]) < sizes[0]
