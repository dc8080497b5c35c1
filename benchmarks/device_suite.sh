#!/usr/bin/env bash
# Everything that needs a CUDA device, in under eight minutes: build, device tests, memory checkers, benchmarks.
#
#     benchmarks/device_suite.sh [FOLDER]        FOLDER (default: device-results) receives all results
#
# Every step runs, whatever became of the one before, for as long as its limit and the eight minutes allow; summary.txt lists
# each with its exit status (124: out of time) and its seconds, and the exit status is 1 if any failed. The package's
# requirements, Triton, pytest with its plugins, hypothesis, pybind11, CMake and Ninja must be installed. PYTHON names the
# interpreter (default: python3).
set -uo pipefail

results=$(mkdir -p "${1:-device-results}" && cd "${1:-device-results}" && pwd) || exit
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
budget=470  # seconds
failed=0
: >"$results/summary.txt"

step() {
    local name=$1 limit=$2 log=$3 start=$SECONDS status left=$((budget - SECONDS))
    shift 3
    ((limit = limit < left ? limit : left > 1 ? left : 1))
    printf '\n=== %s\n' "$name" | tee -a "$results/$log"
    timeout --kill-after=2 "$limit" "$@" </dev/null >>"$results/$log" 2>&1
    status=$?
    tail -n 3 "$results/$log"
    printf '%-40s status %d, %d s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$results/summary.txt"
    [[ $status -eq 0 ]] || failed=1
}

sanitize() {
    local tool=$1
    shift
    step "compute-sanitizer $tool" 60 sanitizer.txt \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" "$python" benchmarks/device_smoke.py
}

step "devices" 30 info.txt nvidia-smi
step "PyTorch sees a GPU" 60 info.txt "$python" -c "import torch; print(torch.zeros(1, device='cuda').device)"
step "build" 120 info.txt env SHIKE_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps -e .
step "info" 60 info.txt "$python" -m shike_fast.info
step "device tests" 220 tests.txt "$python" -m pytest -m gpu tests -q -o timeout=120 --durations=15 \
    --junitxml="$results/tests.xml"
step "benchmarks" 110 benchmarks.txt "$python" -m pytest benchmarks/bench_expert_loss.py --benchmark-only -q -k cuda \
    --benchmark-json="$results/benchmarks.json"
if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck --leak-check no
    sanitize racecheck
    sanitize synccheck
    sanitize initcheck
else
    printf '%-40s not run: compute-sanitizer is not on PATH\n' "memory checkers" | tee -a "$results/summary.txt"
    failed=1
fi
printf '%-40s %d s\n' "all" "$SECONDS" | tee -a "$results/summary.txt"
exit "$failed"
