#!/usr/bin/env bash
# From nothing to a distilled student, on any machine with Python 3.10-3.12 and the package index:
#   bash launch/quickstart.sh            # SEED=1 for another draw, PYTHON=python3.12 for another Python
# Handwritten digits become an image folder, the folder becomes tar shards, a small MAE becomes the teacher, and one
# small student is trained twice for the same number of steps: distilled (DMAE), and by plain MAE. About 8 minutes on 2
# CPU cores after the install. Killed or started again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
OUT=${OUT:-runs/digits-seed$SEED}

if [ ! -e "$VENV/installed" ]; then
    echo "== install into $VENV (torch is large: a minute or more)"
    "$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"found Python {v[0]}.{v[1]}, expected 3.10 to 3.12; set PYTHON=python3.12, say")'
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --editable ".[quickstart]"
    touch "$VENV/installed"
fi
PATH="$(cd "$VENV/bin" && pwd):$PATH"

echo "== images -> tar shards"
for part in train val; do
    [ -d "$OUT/images/$part" ] || python launch/digits.py "$OUT/images"
    [ -e "$OUT/shards/$part/manifest.json" ] || dmae-shards make "$OUT/images/$part" "$OUT/shards/$part" --samples-per-shard 500 --overwrite
done

# Two ranks on CPUs; on GPUs as many as there are, two at most.
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$GPUS" != 0 ] || export DS_ACCELERATOR=cpu
RANKS=$([ "$GPUS" = 1 ] && echo 1 || echo 2)
train() { # NAME RECIPE [key=value ...]
    echo "== train $1 ($2)"
    deepspeed -q --num_gpus "$RANKS" --module dmae_ds train "$2" --resume auto "run.dir=$OUT/$1" "run.seed=$SEED" \
        "data.train=$OUT/shards/train" "data.val=$OUT/shards/val" "${@:3}"
}
train teacher digits_teacher
train dmae digits_dmae "teacher.weights=$OUT/teacher/student.safetensors"
train mae digits_mae

echo "== k-NN on frozen features: 397 digits that nobody was trained on"
for run in teacher dmae mae; do
    printf '%-26s' "$(case $run in teacher) echo "the teacher" ;; dmae) echo "student, distilled (DMAE)" ;; mae) echo "student, plain MAE" ;; esac)"
    dmae-ds eval knn "$OUT/$run" 2>"$OUT/eval.log" || { cat "$OUT/eval.log" >&2; exit 1; }
done
echo "report: $(dmae-ds report "$OUT/dmae" "$OUT/mae" "$OUT/teacher")"
