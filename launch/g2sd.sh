#!/usr/bin/env bash
# Generic-to-specific distillation (G2SD) on handwritten digits, both stages, beside what it is compared with:
#   bash launch/g2sd.sh                  # SEED=1 for another draw, OUT=folder
# A small MAE is the generic teacher, and fine-tuned on labels the specific one. The same small network then learns from labels: after the
# generic stage with the teacher's decisions beside them (G2SD), from random weights with them (DeiT's hard distillation), and after the
# generic stage without them (plain fine-tuning). About 10 minutes on 2 CPU cores after the install. Killed or started again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-0}
OUT=${OUT:-runs/g2sd-seed$SEED}
. launch/digits.sh

finetune() { # NAME: labels alone
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

echo "== top-1 on 397 digits that nobody was trained on"
python - "$OUT" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
rows = (("the teacher, fine-tuned", "teacher"), ("generic, then labels alone", "generic"), ("G2SD: generic, then specific", "specific"), ("DeiT's hard distillation", "deit"))
for name, run in rows:
    lines = [json.loads(line) for line in (out / run / "results.jsonl").read_text().splitlines()]
    print(f"{name:<30}{[line['top1'] for line in lines if line['metric'] in ('finetune', 'supervised')][-1]:.1f}%")
PYTHON
