"""The Triton kernels of depth-wise knowledge fusion compile ahead of time, without spilling registers."""

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from triton.runtime.jit import JITFunction

from shike_fast.kernels.fusion import _backward, _statistics, dkf
from shike_fast.ops._dkf_arguments import DkfArguments

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

KERNELS = [
    value
    for module in (_backward, _statistics, dkf)
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
]


def arguments(shape, dtype, relu, folded=False, norms=True, memory_format=torch.channels_last, affine=True):
    def maps(count):
        return [torch.zeros(shape, dtype=dtype).to(memory_format=memory_format) for _ in range(count)]

    experts = len(relu)
    count = experts * (1 + folded) if norms else 0
    vectors = [torch.ones(shape[1]) if affine else None for _ in range(count)]
    return DkfArguments(maps(experts), maps(experts), maps(experts if folded else 0), vectors, vectors, list(relu))


def run(args, running=True):
    """Launch everything there is, in training."""
    norms, (batch, channels, height, width) = args.norms, args.deep[0].shape
    kept = [torch.ones(channels) for _ in range(2 * norms)] if running else []
    _, sums, mean_rstd, _ = dkf.dkf_forward(args, None, [1e-5] * norms, kept, [0.1] * norms)
    grad_output = torch.zeros(args.experts, batch, channels, dtype=args.deep[0].dtype)
    vectors = dkf.dkf_vector_gradients(args, grad_output, sums)
    dkf.dkf_map_gradients(args, grad_output, mean_rstd, vectors, 1 / (batch * height * width))


LAUNCHES = [  # of experts with these ReLUs, folded, normalised: launches forward, backward
    ((False,), False, True, 2, 2),
    ((False, False, False), False, True, 2, 2),
    ((True, True, True), False, True, 3, 2),
    ((True, False, True), False, True, 3, 2),
    ((True, False, True), True, True, 3, 2),
    ((False, False, False), False, False, 1, 1),
]


@pytest.mark.parametrize(("relu", "folded", "norms", "forward", "backward"), LAUNCHES)
def test_all_experts_share_launches(relu, folded, norms, forward, backward, launches):
    run(arguments((2, 8, 3, 3), torch.float32, relu, folded, norms))
    names = [kernel.__name__ for kernel, _, _ in launches]
    is_backward = [name in ("_vector_kernel", "_gradient_kernel") for name in names]
    assert is_backward == [False] * forward + [True] * backward, names
    launches.clear()
    dkf.dkf_statistics([torch.zeros(2, 8, 3, 3)] * len(relu))
    assert len(launches) == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "relu", "folded"),
    [
        ((64, 2048, 7, 7), torch.bfloat16, (True, False), True),
        ((128, 64, 8, 8), torch.float32, (True, False, True), False),
        pytest.param((64, 2048, 7, 7), torch.bfloat16, (False,), False, marks=pytest.mark.slow),
        pytest.param((64, 2048, 7, 7), torch.bfloat16, (True, False, True), False, marks=pytest.mark.slow),
        pytest.param((128, 64, 8, 8), torch.float32, (False,), True, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_spilling(shape, dtype, relu, folded, target, launches, compiled, registers, record_property):
    run(arguments(shape, dtype, relu, folded))
    for kernel, args, kwargs in launches:
        used, spilled = registers(compiled(kernel, args, kwargs, target))
        record_property(f"{kernel.__name__} {shape} {dtype} {relu} {folded} {target}", f"{used} registers")
        assert spilled == 0, (kernel.__name__, used, spilled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_spilling_is_seen(target, launches, compiled, registers):
    run(arguments((64, 2048, 7, 7), torch.bfloat16, (True,)))
    kernel, args, kwargs = next(launch for launch in launches if launch[0].__name__ == "_gradient_kernel")
    assert registers(compiled(kernel, args, {**kwargs, "maxnreg": 32}, target))[1] > 0


@pytest.mark.parametrize("norms", [True, False])
def test_other_layouts_compile(norms, target, launches, compiled):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        run(arguments((2, 35, 7, 5), torch.float16, (True, False), False, norms, memory_format, affine=False), False)
    sliced = [torch.zeros(2, 8, 9, 12)[:, :, ::2, 1::2] for _ in range(2)]
    run(DkfArguments(sliced[:1], sliced[1:], [], [None], [None], [False]))
    for launch in launches:
        compiled(*launch, target)


@pytest.mark.parametrize("layout", ["channels last", "NCHW"])
def test_wide_loads(layout, launches, compiled):
    """In bfloat16 a thread loads and stores eight channels, or positions, at once: 16 bytes.

    Of normalised maps it takes four channels, which are 16 bytes of the vectors [C].
    """
    memory_format = torch.channels_last if layout == "channels last" else torch.contiguous_format
    shape = (64, 2048, 7, 7) if layout == "channels last" else (64, 64, 8, 8)
    run(arguments(shape, torch.bfloat16, (True, False, True), folded=True, memory_format=memory_format))
    run(arguments(shape, torch.bfloat16, (False, False, False), memory_format=memory_format))
    for kernel, args, kwargs in launches:
        if kernel.__name__ in ("_merge_kernel", "_vector_kernel"):  # these read vectors only
            continue
        ptx = compiled(kernel, args, kwargs, "sm_90").asm["ptx"]
        values = kwargs["BLOCK_P"] * kwargs["BLOCK_C"] // (32 * kwargs["num_warps"])
        few = layout == "channels last" and kernel.__name__ != "_partial_kernel"
        width, words = (4, "v2") if few else (8, "v4")
        assert len(re.findall(rf"ld\.global\.{words}\.b32", ptx)) >= values // width
        if kernel.__name__ == "_gradient_kernel":
            assert len(re.findall(rf"st\.global\.{words}\.b32", ptx)) >= values // width * 2
            assert not re.search(r"st\.global(\.\w+)*\.b16", ptx)


def test_programs_fill_the_device(monkeypatch):
    """Of the kernels over the maps; 132 multiprocessors."""
    grids = []
    for kernel in KERNELS:
        monkeypatch.setattr(
            kernel,
            "run",
            lambda *args, grid, warmup, kernel=kernel, **kwargs: grids.append((kernel.__name__, grid)),
            raising=False,
        )
    for shape in ((128, 64, 8, 8), (256, 2048, 7, 7)):
        run(arguments(shape, torch.bfloat16, (True,)))
    counts = [grid[0] * grid[1] for name, grid in grids if name not in ("_merge_kernel", "_vector_kernel")]
    assert len(counts) == 6 and min(counts) >= 132, grids


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_lanes_agree_about_a_sum(memory_format, launches, compiled):
    """No product is fused into the first step of a butterfly: lane and partner would round it differently."""
    for shape in [(2, 8, 3, 3), (1, 40, 4, 4), (3, 3, 7, 7)]:
        run(arguments(shape, torch.float32, (False,), memory_format=memory_format))
    for launch in launches:
        if launch[0] is not _statistics._partial_kernel:
            continue
        ptx = compiled(*launch, "sm_90").asm["ptx"]
        shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
        added = set(re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx))
        assert shuffled and not shuffled & added
