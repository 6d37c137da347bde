#!/usr/bin/env bash
# The kernel on a real GPU, in less than five minutes and without a network: bash tests/gpu_check.sh [PART ...]
#
#   build      the card, the driver, the versions; nvcc compiles the kernel for this card
#   tests      the device tests of tests/test_kernel.py, which need torch, numpy and pytest alone
#   sanitizer  compute-sanitizer's four tools, side by side, on a short program that launches every kernel
#   bench      python -m kernels.bench, the table of times
#
# Without PART, all of them. Exit status 0: every part that ran passed.
set -u -o pipefail
cd "$(dirname "$0")/.."
parts="${*:-build tests sanitizer bench}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset KERNELS
export CLEANOPD_CACHE="$work/cache" PYTHONPATH="$PWD:$PWD/tests" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PATH="$PATH:/usr/local/cuda/bin"
failed=""

finish() {  # PART STATUS
    case $2 in
        0) echo "== $1: passed" ;;
        124 | 137) echo "== $1: FAILED, it ran into its time limit"; failed="$failed $1" ;;
        *) echo "== $1: FAILED, status $2"; failed="$failed $1" ;;
    esac
}

for part in $parts; do
    echo
    echo "======== $part"
    case $part in
        build)
            timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
            nvcc --version | tail -2
            timeout -k 5 40 python3 - <<'PYTHON'
import sys
import time

import torch

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
print(f"{torch.cuda.get_device_name()}, compute capability {torch.cuda.get_device_capability()}")
from kernels import topk_tail_divergence  # noqa: E402

z = torch.randn(4, 1000, device="cuda", requires_grad=True)
y = torch.randn(4, 1000, device="cuda")
begin = time.time()
value = topk_tail_divergence(z, y)
value.sum().backward()
print(f"compiled, loaded and called in {time.time() - begin:.1f} s: D = {value.tolist()}")
PYTHON
            finish build $?
            ;;
        tests)  # without conftest.py, which imports the whole project, and in one process (as with -n 0)
            timeout -k 5 95 python3 -m pytest tests/test_kernel.py -k "cuda or elements" --noconftest \
                -p no:cacheprovider -o addopts= -q --tb=short --durations=5
            finish tests $?
            ;;
        sanitizer)
            cat > "$work/launch.py" <<'PYTHON'
"""Every kernel in every form, on small and odd shapes. Inputs are copied to the device, so that a copy has set them."""
import itertools

import torch
from kernel_cases import adversarial, ordinary, run

import kernels

kernels.NVCC_FLAGS += ("-lineinfo",)  # reports name the line
lib = kernels.library(torch.device("cuda"))
rows = adversarial(20_000)
calls = 0


def launch(z, y, given=None, inplace=False, **options):
    global calls
    if given is not None:
        options["given"] = given.cuda()
    upstream = torch.linspace(-1, 2, len(z)).cuda()
    value, *_ = run(lib, z.cuda(), y.cuda(), upstream, inplace=inplace, **options)
    value = value.cpu()
    assert not value[1:].isnan().any() and value.isnan().tolist() == z.isnan().any(-1).tolist()
    calls += 1


for dtype in (torch.float32, torch.bfloat16):
    z, y = ordinary(3, 1003, dtype=dtype)  # rows that are not aligned to 16 bytes
    given = torch.randint(-1, 1003, (3, 20), generator=torch.Generator().manual_seed(0))
    for kind, support, outside in itertools.product(kernels.KINDS, kernels.SUPPORTS, kernels.OUTSIDE):
        options = {"given": given} if support == "given" else {}
        launch(z, y, k=20, kind=kind, support=support, outside=outside, **options)
    bad = z.clone()
    bad[0, 5] = torch.nan
    launch(bad, y, k=20)
    z, y = ordinary(2, 5008, dtype=dtype)  # aligned ones, some columns left out
    launch(z, y, k=50, valid_vocab=5001)
    launch(z, y, k=50, inplace=True)
    launch(z, y, support="given", given=torch.arange(30).repeat(2, 1))
    for n, v, k in ((5, 7, 3), (2, 1, 1), (2, 40_001, 1024), (1, 152_064, 100)):
        launch(*ordinary(n, v, dtype=dtype), k=k)
    for name in ("student constant", "a gap of 100", "the teacher's winner is all that the student's leaves"):
        z, y = (x[None].to(dtype) for x in rows[name])
        launch(z, y, k=1)
        launch(z, y, k=100)
torch.cuda.synchronize()
print(f"{calls} calls of the forward and the backward pass")
PYTHON
            # A tensor is an allocation of its own, so that memcheck sees where it ends. The filter of racecheck and
            # synccheck leaves PyTorch's own kernels out; initcheck has to see what those write.
            export PYTORCH_NO_CUDA_MEMORY_CACHING=1
            timeout -k 5 40 python3 "$work/launch.py"  # compiles, and shows that the program itself is right
            status=$?
            if [ $status = 0 ]; then
                tools="memcheck racecheck synccheck initcheck"
                for tool in $tools; do
                    filter="--kernel-name kns=row_"
                    [ $tool = initcheck ] && filter=""
                    (
                        timeout -k 5 75 compute-sanitizer --tool $tool $filter --error-exitcode 9 \
                            --report-api-errors no --print-limit 5 python3 "$work/launch.py" > "$work/$tool.log" 2>&1
                        echo $? > "$work/$tool.status"
                    ) &
                done
                wait
                for tool in $tools; do
                    one=$(cat "$work/$tool.status")
                    echo "-- $tool: status $one (0: nothing found; 9: something was; 124: too slow)"
                    if [ "$one" = 0 ]; then tail -n 2 "$work/$tool.log"; else tail -n 30 "$work/$tool.log"; fi
                    [ "$one" = 0 ] || status=$one
                done
            fi
            unset PYTORCH_NO_CUDA_MEMORY_CACHING
            finish sanitizer $status
            ;;
        bench)
            timeout -k 5 90 python3 -m kernels.bench
            finish bench $?
            ;;
        *) echo "no such part: $part"; failed="$failed $part" ;;
    esac
done

echo
if [ -n "$failed" ]; then
    echo "======== failed:$failed"
    exit 1
fi
echo "======== all passed: $parts"
