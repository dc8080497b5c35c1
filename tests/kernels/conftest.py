"""Fixtures that compile Triton kernels ahead of time: no GPU is needed."""

import re

import pytest

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@pytest.fixture(params=[name if name == "sm_90" else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS])
def target(request):
    """The name of a GPU architecture to compile for, for each of them."""
    return request.param


@pytest.fixture
def launches(monkeypatch, request):
    """Instead of launching, the kernels ``KERNELS`` of the module append (kernel, arguments, keywords) to this list."""
    recorded = []
    for kernel in request.module.KERNELS:
        monkeypatch.setattr(
            kernel,
            "run",
            lambda *args, grid, warmup, kernel=kernel, **kwargs: recorded.append((kernel, args, kwargs)),
            raising=False,
        )
    return recorded


def _compile(kernel, args, kwargs, target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget(*TARGETS[target])
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that compiles a recorded launch for a target, specialised as Triton would do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield _compile


@pytest.fixture
def registers(programs, tmp_path):
    """A function that tells (registers a thread, spills): stores to the stack on NVIDIA, spilled registers on AMD.

    Not the size of the stack: ptxas has reserved one that nothing was ever stored to, with registers to spare.
    """

    def tool(name, *arguments):
        import triton

        done = programs.run([getattr(triton.knobs.nvidia, name).path, *arguments])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def count(binary):
        if "cubin" in binary.asm:
            path = tmp_path / "kernel.cubin"
            path.write_bytes(binary.asm["cubin"])
            usage = tool("cuobjdump", "-res-usage", path)
            return int(re.search(r"REG:(\d+)", usage).group(1)), tool("nvdisasm", path).count(" STL")
        names = ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count")
        counts = [int(re.search(rf"\.{name}:\s+(\d+)", binary.asm["amdgcn"]).group(1)) for name in names]
        return sum(counts[:2]), sum(counts[2:])

    return count
