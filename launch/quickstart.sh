#!/usr/bin/env bash
# From nothing to a distilled student, on any machine with Python 3.10-3.12 and the package index:
#   bash launch/quickstart.sh            # SEED=1 for another draw, PYTHON=python3.12 for another Python
# Handwritten digits become an image folder, the folder becomes tar shards, a small MAE becomes the teacher, and one
# small student is trained twice for the same number of steps: distilled (DMAE), and by plain MAE. About 8 minutes on 2
# CPU cores after the install. Killed or started again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0}
OUT=${OUT:-runs/digits-seed$SEED}
. launch/digits.sh

train teacher digits_teacher
train dmae digits_dmae "teacher.weights=$OUT/teacher/student.safetensors"
train mae digits_mae

echo "== k-NN on frozen features: 397 digits that nobody was trained on"
for run in teacher dmae mae; do
    printf '%-26s' "$(case $run in teacher) echo "the teacher" ;; dmae) echo "student, distilled (DMAE)" ;; mae) echo "student, plain MAE" ;; esac)"
    dmae-ds eval knn "$OUT/$run" 2>"$OUT/eval.log" || { cat "$OUT/eval.log" >&2; exit 1; }
done
echo "report: $(dmae-ds report "$OUT/dmae" "$OUT/mae" "$OUT/teacher")"
