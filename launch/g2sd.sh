#!/usr/bin/env bash
# Generic-to-specific distillation (G2SD) on handwritten digits, both stages, and what it is compared with:
#   bash launch/g2sd.sh                  # classification; SEED=1 for another seed, OUT=folder
#   TASK=segment bash launch/g2sd.sh     # segmentation of scenes of digits
#   TASK=detect bash launch/g2sd.sh      # detection in them
# A small MAE is the generic teacher, and fine-tuned on labels the specific one. One small network then learns
# from labels in three ways: after the generic stage with the specific teacher (G2SD), from random weights with
# it, and after the generic stage without it (plain fine-tuning). Classification takes about 10 minutes on 2
# CPU cores after the install. Killed or started again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh
expect_no_words SEED=1 "$@"
SEED=${SEED:-0}
TASK=${TASK:-classify}
case "$TASK" in
classify) OUT=${OUT:-runs/g2sd-seed$SEED} ;;
segment | detect) OUT=${OUT:-runs/g2sd-scenes-seed$SEED} ;;
*) refuse "TASK is '$TASK'; choose classify, segment or detect" ;;
esac
. launch/digits.sh

classify() {
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
    local classifier="teacher.weights=$OUT/teacher/finetune_digits/best.safetensors"
    train specific digits_g2sd_specific "$classifier" "student.weights=$OUT/generic"
    train deit digits_g2sd_specific "$classifier" student.weights=null optim.layer_decay=1.0
    echo "== top-1 on 397 digits that were not used in training"
}

on_scenes() { # the same on maps or boxes, with patches of 8 px: 96 px have 576 of 4 px
    local scenes=("data.train=$OUT/shards/scenes/train" "data.val=$OUT/shards/scenes/val")
    local size=(student.img_size=96 student.patch_size=8)
    local recipe=detect_scenes
    [ "$TASK" = detect ] || recipe=upernet_scenes
    specialise() { # RUN FOLDER [key=value ...]: on annotations, into $OUT/RUN/FOLDER
        [ -e "$OUT/$1/$2/finished" ] || {
            echo "== $TASK $1, $2"
            dmae-ds eval "$TASK" "$OUT/$1" --recipe "$recipe" --resume auto \
                "run.dir=$OUT/$1/$2" "${scenes[@]}" "${@:3}"
            touch "$OUT/$1/$2/finished"
        }
    }
    python -c 'import pycocotools, transformers' 2>/dev/null ||
        python -m pip install --quiet --editable ".[dense]"
    [ -e "$OUT/shards/scenes/val/manifest.json" ] || OUT="$OUT" bash launch/scenes.sh
    train teacher digits_teacher "${scenes[@]}" "${size[@]}"
    specialise teacher "$TASK"
    train generic digits_g2sd_generic "teacher.weights=$OUT/teacher" teacher.img_size=96 teacher.patch_size=8 \
        "${scenes[@]}" "${size[@]}"
    local specific="distill.teacher=$OUT/teacher/$TASK/best.safetensors"
    specialise generic "$TASK"
    specialise generic "$TASK-specific" "$specific"
    specialise generic "$TASK-random" "$specific" init=random
    echo "== on 200 scenes that were not used in training"
}

if [ "$TASK" = classify ]; then classify; else on_scenes; fi
python - "$OUT" "$TASK" <<'PYTHON'
import sys
from pathlib import Path

from dmae_ds.evaluate.results import headline, headline_score, read_results

# Title -> run, and for scenes the settings of its result.
CLASSIFIERS = {
    "the teacher, fine-tuned": ("teacher", {}),
    "generic, then labels alone": ("generic", {}),
    "G2SD: generic, then specific": ("specific", {}),
    "DeiT's hard distillation": ("deit", {}),
}
ON_SCENES = {
    "the teacher": ("teacher", {"distill": False}),
    "generic, then annotations alone": ("generic", {"distill": False}),
    "G2SD: generic, then specific": ("generic", {"distill": True, "init": "weights"}),
    "from random weights, specific": ("generic", {"distill": True, "init": "random"}),
}
out, task = sys.argv[1:]
metrics = ("finetune", "supervised") if task == "classify" else (task,)
for title, (run, settings) in (CLASSIFIERS if task == "classify" else ON_SCENES).items():
    results = [result for result in read_results(Path(out) / run) if result["metric"] in metrics]
    newest = [result for result in results if settings.items() <= result["settings"].items()][-1]
    print(f"{title:<33}{headline_score(newest['metric']).format(headline(newest))}")
PYTHON
