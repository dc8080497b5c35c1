"""No kernel costs more than docs/records/kernels_static.md says: instructions, bytes, bank conflicts, registers.

The bounds lie a few percent above what is recorded there. Who makes a kernel better, or has to make one worse, writes
the document anew: ``python benchmarks/kernel_figures.py``.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from figures import (
    CASES,
    LARGE_FUSIONS,
    SMALL_FUSIONS,
    Figures,
    Found,
    Resources,
    of_triton,
    resources_of_cuda,
    resources_of_triton,
)

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "records" / "kernels_static.md"
NVCC_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SLACK = 1.03
ROUNDING = 0.06  # of what the document prints


class Bound(NamedTuple):
    """Figures of a kernel as the document has them."""

    instructions: float
    lanes: float  # %
    read: float  # kB
    written: float
    bank_conflicts: float

    def exceeded_by(self, kernel: Figures) -> list[str]:
        """What is worse than it may be."""
        now = Bound(
            kernel.instructions, 100 * kernel.lanes, kernel.read / 1e3, kernel.written / 1e3, kernel.bank_conflicts
        )
        worse = [
            f"{name}: {value:.2f}, not {recorded}"
            for name, value, recorded in zip(self._fields, now, self, strict=True)
            if name != "lanes" and value > SLACK * recorded + ROUNDING
        ]
        return worse + ([f"lanes: {now.lanes:.1f} %, not {self.lanes}"] if now.lanes < self.lanes / SLACK - 0.5 else [])


class Record:
    """What the document says."""

    def __init__(self, text: str) -> None:
        self.versions = dict(re.findall(r"`(cuda|triton)`: \w+ (\S+?)[,.]?(?=\s)", text))
        self.bounds: dict[tuple[str, str], list[tuple[str, Bound]]] = {}  # (case, backend) -> kernels in order
        self.registers: dict[tuple[str, str, str, str], Resources] = {}  # (backend, architecture, kernel, of)
        for section in text.split("\n### ")[1:]:
            title, _, body = section.partition("\n")
            rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in body.split("\n")]
            header, _, *rows = [row for row in rows if row]
            if title.startswith("`"):
                self._read_registers(title.strip("`"), header, rows)
            else:
                self._read_case(title, rows)

    def _read_case(self, case: str, rows: list[list[str]]) -> None:
        backend = ""
        for row in rows:
            backend = row[0] or backend
            bound = Bound(*(float(row[column]) for column in (4, 6, 7, 9, 11)))
            self.bounds.setdefault((case, backend), []).append((row[1], bound))

    def _read_registers(self, backend: str, header: list[str], rows: list[list[str]]) -> None:
        for kernel, case, *cells in rows:
            for i in range(0, len(cells), 2):
                if cells[i]:
                    architecture = header[2 + i]
                    self.registers[backend, architecture, kernel, case] = Resources(*map(int, cells[i : i + 2]))


@pytest.fixture(scope="module")
def record() -> Record:
    return Record(DOCUMENT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("kernel_figures", ROOT / "benchmarks" / "kernel_figures.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def check(record: Record, backend: str, found: dict[str, Found]) -> None:
    worse = {}
    for case, of in found.items():
        bounds = record.bounds[case, backend]
        assert [without_number(kernel.kernel) for kernel in of.kernels] == [name for name, _ in bounds], case
        for kernel, (_, bound) in zip(of.kernels, bounds, strict=True):
            if what := bound.exceeded_by(kernel):
                worse[case, kernel.kernel] = what
    assert not worse, worse


def without_number(kernel: str) -> str:
    return re.sub(r"_kernel_\d+$", "_kernel", kernel)


@pytest.fixture(scope="module")
def nvcc(record, programs):
    """The compiler, of the release that the bounds are for."""
    path = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if path is None:
        pytest.skip("needs nvcc")
    (release,) = re.findall(r"release (\S+),", programs.run([path, "--version"]).stdout)
    if release != record.versions["cuda"]:
        pytest.skip(f"recorded with nvcc {record.versions['cuda']}, this is {release}")
    return path


def of_cuda(interpreted, cases="CASES") -> dict[str, Found]:
    found = interpreted("figures", "of_cuda", cases=cases)
    return {case: Found([Figures(*row) for row in rows], sectors) for case, (rows, sectors) in found.items()}


@pytest.fixture(scope="module")
def cuda_figures(interpreted) -> dict[str, Found]:
    return of_cuda(interpreted)


@pytest.mark.slow
def test_cuda(record, nvcc, cuda_figures):
    check(record, "cuda", cuda_figures)


def aligned_losses(found: dict[str, Found]) -> dict[str, Found]:
    return {case: of for case, of in found.items() if case.startswith(("dkt_", "expert_")) and "misaligned" not in case}


@pytest.mark.slow
def test_losses_waste_no_sector_and_no_bank(cuda_figures):
    check_waste(aligned_losses(cuda_figures))


@pytest.mark.slow
def test_one_reading_is_one_reading(cuda_figures):
    """The requests of forward and backward together, beside the logits and their gradient."""
    cases = [case for case in CASES if case.keeps and "misaligned" not in case.name]
    assert cases
    for case in cases:
        moved = sum(kernel.read + kernel.written for kernel in cuda_figures[case.name].kernels)
        assert moved <= 1.05 * case.ideal, (case.name, moved / case.ideal)


@pytest.mark.slow
def test_misaligned_experts_cost_little_more(cuda_figures):
    cases = [case for case in cuda_figures if "misaligned" in case]
    assert cases
    for case in cases:
        aligned = cuda_figures[case.replace(" of misaligned experts", "")].kernels
        for kernel, usual in zip(cuda_figures[case].kernels, aligned, strict=True):
            assert kernel.instructions <= 1.4 * usual.instructions, (case, kernel, usual)


@pytest.mark.slow
def test_fusions_move_little_more_than_the_maps(interpreted):
    """The requests of forward and backward together, those for vectors and statistics included."""
    ideal = {case.name: case.ideal for case in LARGE_FUSIONS}
    for case, found in of_cuda(interpreted, "LARGE_FUSIONS").items():
        moved = sum(kernel.read + kernel.written for kernel in found.kernels)
        assert moved <= 1.03 * ideal[case], (case, moved / ideal[case])


@pytest.mark.slow
def test_fusions_waste_no_sector_and_no_bank(interpreted):
    """Of aligned maps, in every dtype."""
    check_waste(of_cuda(interpreted, "SMALL_FUSIONS"))


def check_waste(found: dict[str, Found]) -> None:
    for case, of in found.items():
        for kernel in of.kernels:
            assert kernel.bank_conflicts <= 1.1, (case, kernel)
        assert max(of.sectors.values()) <= 1.06, (case, of.sectors)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", NVCC_ARCHITECTURES)
def test_registers_of_cuda(architecture, record, nvcc, ptx_build, programs):
    pytest.importorskip("triton", reason="needs Triton's disassembler")
    folder = ptx_build(architecture.removeprefix("sm_"))
    found = resources_of_cuda(folder, architecture, nvcc, programs.run)
    recorded = {
        kernel: bound
        for (backend, name, kernel, _), bound in record.registers.items()
        if (backend, name) == ("cuda", architecture)
    }
    assert found.keys() == recorded.keys()
    worse = {kernel: (now, recorded[kernel]) for kernel, now in found.items() if exceeds(now, recorded[kernel])}
    assert not worse, worse


def exceeds(now: Resources, recorded: Resources) -> bool:
    return now.registers > SLACK * recorded.registers or now.spills > SLACK * recorded.spills


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_triton(architecture, record, programs, tmp_path):
    triton = pytest.importorskip("triton", reason="needs Triton, which is not installed")
    if triton.__version__ != record.versions["triton"]:
        pytest.skip(f"recorded with Triton {record.versions['triton']}, this is {triton.__version__}")
    from triton_host import Driver

    driver = Driver(architecture, assemble=True)
    found = of_triton(driver)
    if architecture == "sm_90":
        check(record, "triton", found)
    cases = {kernel.kernel: case for case, of in reversed(found.items()) for kernel in of.kernels}
    for kernel, now in resources_of_triton(driver, tmp_path, programs.run).items():
        recorded = record.registers["triton", architecture, without_number(kernel), cases[kernel]]
        assert not exceeds(now, recorded), (kernel, now, recorded)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process")
def test_triton_kernels_waste_no_sector_and_no_bank():
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    from triton_host import driver_of

    driver = driver_of("sm_90")
    check_waste(of_triton(driver, SMALL_FUSIONS))
    losses = of_triton(driver, [case for case in CASES if case.name.startswith(("dkt_", "expert_"))])
    for case, of in losses.items():  # all accesses together, for the few classes outside whole chunks begin anywhere
        for kernel in of.kernels:
            assert max(kernel.read_ratio, kernel.written_ratio) <= 1.06, (case, kernel)
            assert kernel.bank_conflicts <= 1.1, (case, kernel)


# ---- the document


def test_every_kernel_is_recorded(record):
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*/*") if path.suffix != ".md")
    kernels = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources))
    recorded = {kernel.partition("<")[0] for backend, _, kernel, _ in record.registers if backend == "cuda"}
    assert kernels and kernels <= recorded, kernels - recorded
    assert set(record.bounds) == {(case.name, backend) for case in CASES for backend in case.backends}


def test_what_is_written_is_read(script):
    kernel = Figures("some_kernel_7", (8, 3, 1), 256, 31.06, 5.2, 0.93, 411_008, 1.03, 5_632, 1.0, 2.0)
    usage = {"sm_90": {"some_kernel_7": Resources(71, 2), "other_kernel<3>": Resources(40, 0)}}
    text = script.document(
        {"cuda": "nvcc 13.0", "triton": "Triton 3.9.0"}, {"a case": (833_280, {"triton": [kernel]})}, {"triton": usage}
    )
    read = Record(text)
    assert read.versions == {"cuda": "13.0", "triton": "3.9.0"}
    assert read.bounds == {("a case", "triton"): [("some_kernel", Bound(31.1, 93, 411.0, 5.6, 2.0))]}
    assert read.registers == {
        ("triton", "sm_90", "some_kernel", "a case"): Resources(71, 2),
        ("triton", "sm_90", "other_kernel<3>", ""): Resources(40, 0),
    }
    assert "`triton` 416.6 kB (0.50 times)" in text and max(map(len, text.split("\n"))) <= 120


@pytest.mark.parametrize(
    ("figure", "value", "told"),
    [
        ("instructions", 32.0, []),
        ("instructions", 33.0, ["instructions: 33.00, not 31.1"]),
        ("lanes", 0.8, ["lanes: 80.0 %, not 93"]),
        ("read", 450_000, ["read: 450.00, not 411.0"]),
        ("bank_conflicts", 3.0, ["bank_conflicts: 3.00, not 2.0"]),
    ],
)
def test_a_worse_kernel_is_noticed(figure, value, told):
    kernel = Figures("some_kernel", (8,), 256, 31.06, 5.2, 0.93, 411_008, 1.03, 5_632, 1.0, 2.0)
    assert Bound(31.1, 93, 411.0, 5.6, 2.0).exceeded_by(kernel._replace(**{figure: value})) == told
