#!/usr/bin/env bash
# What only a GPU can show, in one call (`make gpu`): the tests with compiled kernels, NVIDIA's memory checker over every kernel, the benchmarks.
# Each part runs whatever became of the others; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset TRITON_INTERPRET

python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here" >&2; exit 2; }
python -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'

failed=()
part() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

part "tests, kernels compiled" python -m pytest -q -n 4 --dist loadgroup
if command -v compute-sanitizer >/dev/null; then
    # Without PyTorch's caching allocator, a kernel that leaves its tensor leaves its allocation too.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    every_kernel='import torch; torch.set_default_device("cuda"); from bench.launches import LAUNCHES; [launch() for launch in LAUNCHES.values()]'
    for tool in memcheck racecheck; do
        part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python -c "$every_kernel"
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
    echo "== compute-sanitizer is not installed: memory is not checked"
fi
part "benchmarks" python -m bench --quick

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
