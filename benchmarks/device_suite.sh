#!/usr/bin/env bash
# Everything that needs a CUDA device, in parts of less than eight minutes each.
#
#     benchmarks/device_suite.sh [FOLDER [PART ...]]
#
# FOLDER (default: device-results) receives all results. The parts, all by default, one after the other:
#
#     tests       the device tests without Triton's
#     sanitizer   the memory checkers, on this library's kernels alone
#     triton      Triton's device tests, which mostly compile
#     benchmarks  the benchmarks of the operators; Triton compiles there too
#     training    the benchmarks of whole training steps, of the experts' last stages and of image loading; torch.compile
#                 works there
#
# Each part builds first, which takes seconds when nothing changed. Every step runs, whatever became of the one before, for
# as long as its limit and the part's eight minutes allow; summary.txt lists each with its exit status (124: out of time) and
# its seconds, and the exit status is 1 if any failed. The package's requirements, Triton, pytest with its plugins,
# hypothesis, pybind11, CMake and Ninja must be installed. PYTHON names the interpreter (default: python3).
set -uo pipefail

results=$(mkdir -p "${1:-device-results}" && cd "${1:-device-results}" && pwd) || exit
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
shift
parts=${*:-tests sanitizer triton benchmarks training}
budget=470  # seconds of a part
failed=0
: >"$results/summary.txt"

step() {
    local name=$1 limit=$2 log=$3 start=$SECONDS status left=$((budget - SECONDS + part_start))
    shift 3
    ((limit = limit < left ? limit : left > 1 ? left : 1))
    printf '\n=== %s\n' "$name" | tee -a "$results/$log"
    timeout --kill-after=2 "$limit" "$@" </dev/null >>"$results/$log" 2>&1
    status=$?
    tail -n 3 "$results/$log"
    printf '%-40s status %d, %d s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$results/summary.txt"
    [[ $status -eq 0 ]] || failed=1
}

# Only kernels whose names contain "shike" are watched: the others would take most of the time, and are not ours.
sanitize() {
    local tool=$1 dtype=$2
    shift 2
    step "compute-sanitizer $tool, $dtype" 150 sanitizer.txt \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=shike "$@" \
        "$python" benchmarks/device_smoke.py cuda cuda "$dtype"
}

build() {
    step "devices" 30 info.txt nvidia-smi
    step "PyTorch sees a GPU" 60 info.txt "$python" -c "import torch; print(torch.zeros(1, device='cuda').device)"
    step "build" 150 info.txt env SHIKE_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps -e .
    step "info" 60 info.txt "$python" -m shike_fast.info
    step "verify" 150 verify.json "$python" -m shike_fast.verify --again --seconds 60 --json
}

benchmark() {
    local name=$1 limit=$2
    step "$name" "$limit" benchmarks.txt "$python" -m pytest "benchmarks/$name.py" --benchmark-only -q -k cuda \
        --benchmark-json="$results/$name.json"
}

device_tests() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" tests.txt "$python" -m pytest -n 0 -m gpu tests -q -o timeout=200 --durations=15 \
        --junitxml="$results/${name// /_}.xml" "$@"
}

for part in $parts; do
    part_start=$SECONDS
    printf '\n##### %s\n' "$part" | tee -a "$results/summary.txt"
    build
    case $part in
    tests)
        device_tests "device tests" 420 -k "not triton"
        ;;
    sanitizer)
        if command -v compute-sanitizer >/dev/null; then
            sanitize memcheck float32 --leak-check no
            sanitize racecheck bfloat16
            sanitize synccheck bfloat16
            sanitize initcheck float16
        else
            printf '%-40s not run: compute-sanitizer is not on PATH\n' "memory checkers" | tee -a "$results/summary.txt"
            failed=1
        fi
        ;;
    triton) device_tests "Triton tests" 420 -k triton ;;
    benchmarks)
        for file in benchmarks/bench_*.py; do
            name=$(basename "$file" .py)
            [[ $name =~ ^bench_(experts|train|loader|containers|decode)$ ]] || benchmark "$name" 240
        done
        ;;
    training)
        benchmark bench_experts 90
        benchmark bench_train 240
        benchmark bench_loader 60
        ;;
    *)
        printf 'unknown part %s\n' "$part" | tee -a "$results/summary.txt"
        failed=1
        ;;
    esac
done
printf '%-40s %d s\n' "all" "$SECONDS" | tee -a "$results/summary.txt"
exit "$failed"
