#!/usr/bin/env bash
# Everything that needs a CUDA device, in parts of less than eight minutes each.
#
#     benchmarks/device_suite.sh [FOLDER [PART ...]]
#
# FOLDER (default: device-results) receives all results. The parts, all by default, one after the other:
#
#     trials, timings, tests, sanitizer, triton   those of `python -m shike_fast.verify --full`
#     benchmarks  the benchmarks of the operators; Triton compiles there too
#     training    the benchmarks of whole training steps, of the experts' last stages and of image loading; torch.compile
#                 works there
#     methods     losses and training steps of some methods against their published formulations; torch.compile too
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
parts=${*:-trials timings tests sanitizer triton benchmarks training methods}
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

build() {
    step "devices" 30 info.txt nvidia-smi
    step "PyTorch sees a GPU" 60 info.txt "$python" -c "import torch; print(torch.zeros(1, device='cuda').device)"
    step "build" 150 info.txt env SHIKE_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps -e .
    step "info" 60 info.txt "$python" -m shike_fast.info
}

benchmark() {
    local name=$1 limit=$2 cases=${3:-cuda}
    step "$name" "$limit" benchmarks.txt "$python" -m pytest "benchmarks/$name.py" --benchmark-only -q -k "$cases" \
        --benchmark-json="$results/$name.json"
}

verify() {
    step "verify --full $1" 460 verify.txt "$python" -m shike_fast.verify --full "$1" --device cuda --seconds 60 \
        --output-dir "$results/$1"
}

for part in $parts; do
    part_start=$SECONDS
    printf '\n##### %s\n' "$part" | tee -a "$results/summary.txt"
    build
    case $part in
    trials | timings | tests | sanitizer | triton) verify "$part" ;;
    benchmarks)
        for file in benchmarks/bench_*.py; do
            name=$(basename "$file" .py)
            [[ $name =~ ^bench_(experts|train|loader|containers|decode|method_loss|method_step)$ ]] || benchmark "$name" 240
        done
        ;;
    training)
        benchmark bench_experts 90
        benchmark bench_train 240
        benchmark bench_loader 60
        ;;
    methods)
        benchmark bench_method_loss 240 "cuda and (ldam or balpoe or ride or sade or mdcs)"
        benchmark bench_method_step 200 "cuda and compiled and (balpoe or ride)"
        ;;
    *)
        printf 'unknown part %s\n' "$part" | tee -a "$results/summary.txt"
        failed=1
        ;;
    esac
done
printf '%-40s %d s\n' "all" "$SECONDS" | tee -a "$results/summary.txt"
exit "$failed"
