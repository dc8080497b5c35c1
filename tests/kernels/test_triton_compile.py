"""The Triton kernels of ``dkt_loss`` compile ahead of time for NVIDIA and AMD GPUs, without spilling registers.

No GPU is needed: the launches of the public functions are recorded and compiled, specialised as Triton would do it.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from triton.runtime.jit import JITFunction

from shike_fast.kernels.losses import _rows, dkt

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

SHAPES = [  # a loop of blocks; one block
    *((3, 8142), (3, 100)),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((1, 8142), (4, 8142), (8, 8142), (4, 1000))),
]
KERNELS = [value for name, value in vars(dkt).items() if isinstance(value, JITFunction) and name.endswith("_kernel")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("experts", "classes"), SHAPES)
def test_compiles_without_spilling(experts, classes, dtype, target, launches, compiled, registers, record_property):
    logits, labels = [torch.zeros(experts, 128, classes, dtype=dtype)], torch.zeros(128, dtype=torch.int64)
    options = (10.0, 1.0, 0.0, -30.0, False)
    one = torch.ones(())
    factors = torch.ones(2, dtype=torch.float64) if dtype == torch.float32 else None
    _, _, state = dkt.dkt_forward(logits, labels, factors, *options)
    dkt.dkt_backward(one, logits, labels, factors, state, *options)
    assert {kernel for kernel, _, _ in launches} == set(KERNELS) and len(KERNELS) == 3
    for kernel, args, kwargs in launches:
        binary = compiled(kernel, args, kwargs, target)
        used, spilled = registers(binary)
        record_property(
            f"{kernel.__module__}{kernel.__name__} K={experts} C={classes} {dtype} {target}",
            f"{kwargs} registers={used} spills={spilled}",
        )
        assert spilled == 0 or experts > 4, (kernel.__name__, used, spilled)


def test_other_layouts_compile(target, launches, compiled):
    transposed = torch.zeros(16, 8142, 3, dtype=torch.float16).permute(2, 0, 1)
    apart = [torch.zeros(16, 8143, dtype=torch.float16)[:, 1:] for _ in range(2)]  # not aligned to 16 bytes
    labels = torch.zeros(32, dtype=torch.int64)[::2]
    options, one = (10.0, 1.0, 0.0, -30.0, True), torch.ones(())
    for logits in ([transposed], apart):
        _, _, state = dkt.dkt_forward(logits, labels, None, *options)
        dkt.dkt_backward(one, logits, labels, None, state, *options)
    for launch in launches:
        compiled(*launch, target)


def test_wide_loads_of_odd_rows(launches, compiled):
    # Rows of 100 classes start at multiples of 8 bytes in bfloat16: a thread loads four classes at once.
    logits, labels = [torch.zeros(3, 8, 100, dtype=torch.bfloat16)], torch.zeros(8, dtype=torch.int64)
    dkt.dkt_forward(logits, labels, None, 10.0, 1.0, 0.0, -30.0, False)
    ptx = compiled(*launches[0], "sm_90").asm["ptx"]
    assert len(re.findall(r"ld\.global\.v2\.b32", ptx)) == 3


def test_unused_terms_cost_nothing(launches, compiled):
    logits, labels = [torch.zeros(3, 8, 100)], torch.zeros(8, dtype=torch.int64)
    for weights in ((10.0, 1.0), (10.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        dkt.dkt_forward(logits, labels, None, *weights, 0.0, -30.0, False)
    sizes = [
        compiled(*launch, "sm_90").asm["ptx"].count("\n") for launch in launches if launch[0] is dkt._forward_kernel
    ]
    assert sizes[3] < min(sizes[1:3]) and max(sizes[1:3]) < sizes[0]


def test_distances_between_experts_do_not_choose_a_kernel(launches):
    """They depend on the allocator: near and far tensors have arguments of the same types."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    logits, labels = [torch.zeros(2, 8) for _ in range(2)], torch.zeros(2, dtype=torch.int64)
    dkt.dkt_forward(logits, labels, None, 10.0, 1.0, 0.0, -30.0, False)
    kernel, args, kwargs = launches[0]
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    types = []
    for distance in (0, 1, 16, 2**33, -(2**45)):
        offsets = _rows.layout_of(logits)._replace(offsets=(0, distance)).arguments(labels)[2]
        _, specialization, _ = bind(*args[:2], offsets, *args[3:], debug=False, **kwargs)
        types.append(specialization[2])  # and what is known of their alignment
    assert all(each == types[0] for each in types), types
