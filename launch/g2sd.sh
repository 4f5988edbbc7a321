#!/usr/bin/env bash
# Generic-to-specific distillation (G2SD) on handwritten digits, both stages, and what it is compared with:
#   bash launch/g2sd.sh                  # SEED=1 for another seed, OUT=folder
# A small MAE is the generic teacher, and fine-tuned on labels the specific one. One small network then learns
# from labels in three ways: after the generic stage with the teacher's decisions (G2SD), from random weights
# with them (DeiT's hard distillation), and after the generic stage without them (plain fine-tuning). About 10
# minutes on 2 CPU cores after the install. Killed or started again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0}
OUT=${OUT:-runs/g2sd-seed$SEED}
. launch/digits.sh

finetune() { # NAME: on labels alone
    [ -e "$OUT/$1/finetune_digits/finished" ] || {
        echo "== fine-tune $1"
        dmae-ds eval finetune "$OUT/$1" --recipe finetune_digits --resume auto
        touch "$OUT/$1/finetune_digits/finished"
    }
}
train teacher digits_teacher
finetune teacher
train generic digits_g2sd_generic "teacher.weights=$OUT/teacher"
finetune generic
CLASSIFIER="teacher.weights=$OUT/teacher/finetune_digits/best.safetensors"
train specific digits_g2sd_specific "$CLASSIFIER" "student.weights=$OUT/generic"
train deit digits_g2sd_specific "$CLASSIFIER" student.weights=null optim.layer_decay=1.0

echo "== top-1 on 397 digits that were not used in training"
python - "$OUT" <<'PYTHON'
import sys
from pathlib import Path

from dmae_ds.evaluate.results import headline, read_results

RUNS = {
    "teacher": "the teacher, fine-tuned",
    "generic": "generic, then labels alone",
    "specific": "G2SD: generic, then specific",
    "deit": "DeiT's hard distillation",
}
for run, title in RUNS.items():
    results = read_results(Path(sys.argv[1]) / run)
    newest = [result for result in results if result["metric"] in ("finetune", "supervised")][-1]
    print(f"{title:<30}{headline(newest):.1f}%")
PYTHON
