"""The Triton kernels of the classifiers compile ahead of time, to tensor cores and with next to no spilled register."""

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")

from shike_fast.kernels.classifiers import logits

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

KERNELS = [logits._product_kernel, logits._dots_kernel]
EPS = 1e-12
MOST_SHARED = 99 * 1024  # of a block on GPUs for consumers
# In the loop over the depth: 64 x 64 x 32 are 32 products of 16 x 8 x 8 of each of four warps, or four of a group; each
# is made three times. AMD's instructions take float32.
PRODUCTS = {
    "sm_80": (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32", {"highest": 96, "high": 32}),
    "sm_90": (r"wgmma\.mma_async\.sync\.aligned\.m64n64k8\.f32\.tf32\.tf32", {"highest": 12, "high": 4}),
    "gfx942": (r"v_mfma_f32_32x32x2_f32", {}),
}


def launch(shape, precision, scale=30.0):
    experts, batch, dim, classes = shape
    x, w, bias = torch.zeros(experts, batch, dim), torch.zeros(experts, dim, classes), None
    if scale is None:
        bias = torch.zeros(experts, classes)
    z, *norms, kept = logits.logits_forward(x, w, bias, scale, EPS, precision, True)
    logits.logits_backward(z, x, w, norms, kept, scale, EPS, precision, (True, True))


@pytest.mark.parametrize("precision", ["highest", pytest.param("high", marks=pytest.mark.slow)])
@pytest.mark.parametrize("classes", [8142, pytest.param(1000, marks=pytest.mark.slow)])
def test_compiles_to_tensor_cores(
    classes, precision, target, launches, compiled, registers, record_property, monkeypatch
):
    monkeypatch.setattr(logits, "_TENSOR_CORES", target != "gfx942")
    launch((3, 256, 2048, classes), precision)
    assert [kernel for kernel, _, _ in launches] == [KERNELS[0], KERNELS[1], *[KERNELS[0]] * 2]
    instruction, counts = PRODUCTS[target]
    for kernel, args, kwargs in launches:
        binary = compiled(kernel, args, kwargs, target)
        used, spilled = registers(binary)
        record_property(f"{kernel.__name__} {precision} {target}", f"registers={used}")
        most = 2 if target == "sm_80" and classes == 1000 else 0  # of dx, which has all 255 registers there
        assert spilled <= most and binary.metadata.shared <= MOST_SHARED
        if kernel is KERNELS[0]:
            text = binary.asm["amdgcn" if target == "gfx942" else "ptx"]
            found = len(re.findall(instruction, text))
            assert found == counts.get(precision, found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("scale", [30.0, None])
def test_other_shapes_compile(scale, target, launches, compiled, monkeypatch):
    monkeypatch.setattr(logits, "_TENSOR_CORES", target != "gfx942")
    launch((2, 3, 7, 9), "highest", scale)
    for each in launches:
        compiled(*each, target)


def test_rows_of_8142_classes_are_copied_eight_bytes_at_a_time(launches, compiled):
    launch((3, 64, 2048, 8142), "highest")
    ptx = compiled(*launches[0], "sm_80").asm["ptx"]
    assert {int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x\w+)", ptx)} == {8, 16}


def test_a_batch_of_another_size_compiles_nothing_anew(launches):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, seen = make_backend(GPUTarget("cuda", 90, 32)), []
    for batch in (1, 5, 16, 256):
        launches.clear()
        launch((3, batch, 64, 100), "highest")
        seen.append([])
        for kernel, args, kwargs in launches:
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            seen[-1].append(str(bind(*args, debug=False, **kwargs)[1:]))
    assert len(seen[0]) == 4 and all(each == seen[0] for each in seen)
