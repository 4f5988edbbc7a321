#!/usr/bin/env bash
# Everything that one GPU can show, in two processes:
#   bash launch/gpu_check.sh [OUT] [--rehearse]
# 1. correctness (tests/gpu): losses next to the CPU's for every objective and precision, ZeRO stages, resumes,
#    reshards, a host that never waits, teacher placements, k-NN, fine-tuning
# 2. figures (dmae-ds bench gpu): steps of ViT-L -> ViT-B by micro-batch, teacher dtype and compilation, predicted
#    and measured memory
# OUT (default runs/gpu_check) then holds gpu_check.json and gpu_check.md, with the device's name. Started again
# it continues: what has passed or was measured is left out. With two GPUs or more a teacher in two stages and a
# killed rank are checked over NCCL too. Exit code 1 if a check failed or a figure broke.
#   --rehearse      the same code at tiny sizes on the CPU; its numbers mean nothing
#   PYTHON=python3  an interpreter with torch, timm and torchvision, and with the rest or
#   WHEELS=folder   the rest as wheels, installed into OUT without the package index (launch/README.md)
# Rehearsed by tests/launch/test_gpu_check.py on CPUs. NOT RUN ON A GPU.
set -euo pipefail
PYTHON=${PYTHON:-python3} out="" rehearse=()
for word in "$@"; do
    case $word in
    --rehearse) rehearse=(--rehearse) ;;
    *)
        if [ -n "$out" ] || [[ "$word" =~ ^(-|[A-Z]+=) ]]; then
            echo "gpu_check.sh: '$word' is unknown; write: bash launch/gpu_check.sh [OUT] [--rehearse]" >&2
            exit 2
        fi
        out=$word
        ;;
    esac
done
out=${out:-runs/gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)}
cd "$(dirname "$0")/.."
. launch/environment.sh
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
    if [ ! -e "$out/packages/installed" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$out/packages" "$wheels"/*.whl
        touch "$out/packages/installed"
    fi
    export PYTHONPATH="$PYTHONPATH:$out/packages" PATH="$out/packages/bin:$PATH"
fi
"$PYTHON" - <<'PYTHON'
import importlib.util
import sys

NEEDED = "torch torchvision timm deepspeed accelerate pydantic webdataset simplejpeg isal sklearn pytest"
missing = [name for name in NEEDED.split() if importlib.util.find_spec(name) is None]
if missing:
    print(f"gpu_check.sh: not installed: {', '.join(missing)}; pip install '.[test]', or set WHEELS", file=sys.stderr)
    sys.exit(2)
PYTHON

checks=(tests/gpu tests/teacher/test_fp8.py tests/train/test_waits.py) marked=gpu
export GPU_CHECK_OUT=$out GPU_CHECK=run
if [ ${#rehearse[@]} != 0 ]; then
    export GPU_CHECK=rehearse CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu
    checks=(tests/gpu)
elif [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    checks+=("tests/train/test_stream.py::test_losses_and_student_are_those_of_a_replicated_teacher"
        "tests/train/test_stream.py::test_a_rank_killed_in_the_pipeline_ends_the_job_and_is_named")
    marked='gpu or not slow'
fi
failed=0
# Without TF32: fp32 is compared with the CPU's.
NVIDIA_TF32_OVERRIDE=0 "$PYTHON" -m pytest -q -p tests.gpu.record -p no:cacheprovider -m "$marked" "${checks[@]}" || failed=1
"$PYTHON" -m dmae_ds bench gpu "$out" "${rehearse[@]}" || failed=1
exit $failed
