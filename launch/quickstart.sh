#!/usr/bin/env bash
# From nothing to a distilled student, on any machine with Python 3.10-3.12 and the package index:
#   bash launch/quickstart.sh            # SEED=1 for another seed, PYTHON=python3.12 for another Python
# Handwritten digits become an image folder, the folder becomes tar shards, a small MAE becomes the teacher,
# and one small student is trained twice for the same number of steps: distilled (DMAE), and by plain MAE.
# About 8 minutes on 2 CPU cores after the install. Killed or started again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh
expect_no_words SEED=1 "$@"
SEED=${SEED:-0}
OUT=${OUT:-runs/digits-seed$SEED}
. launch/digits.sh

train teacher digits_teacher
train dmae digits_dmae "teacher.weights=$OUT/teacher/student.safetensors"
train mae digits_mae

knn() { # NAME TITLE
    printf '%-26s' "$2"
    dmae-ds eval knn "$OUT/$1" 2>"$OUT/eval.log" || { cat "$OUT/eval.log" >&2; exit 1; }
}
echo "== k-NN on frozen features: 397 digits that were not used in training"
knn teacher "the teacher"
knn dmae "student, distilled (DMAE)"
knn mae "student, plain MAE"
echo "report: $(dmae-ds report "$OUT/dmae" "$OUT/mae" "$OUT/teacher")"
