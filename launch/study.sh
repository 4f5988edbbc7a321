#!/usr/bin/env bash
# The paper's ablations, and the other distillers, at the scale of handwritten digits, three seeds each, into RESULTS.md:
#   bash launch/study.sh                 # SEEDS="0" for one seed, JOBS=4 runs at a time, OUT=folder; ONLY="dino mocov3" for some settings
# Some hours on 2 CPU cores after the install. Every run has the steps, data and initial weights of the others of its seed, and
# the ablations their rate too; another objective has the rate of its recipe. Killed or started again, it continues where it
# was; what is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-2}
OUT=${OUT:-runs/study}
ONLY=${ONLY:-}
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Name of the run, its recipe, and what is different: the rows of Tables 1 to 4 that make sense at this scale.
SETTINGS="
mae               digits_mae
mae-mask-.90      digits_mae   objective.mask_ratio=.90
mae-mask-.95      digits_mae   objective.mask_ratio=.95
dmae              digits_dmae
dmae-mask-.90     digits_dmae  objective.mask_ratio=.90
dmae-mask-.95     digits_dmae  objective.mask_ratio=.95
dmae-block-1-2   digits_dmae  objective.pairs=[[1,2]]
dmae-block-2-4   digits_dmae  objective.pairs=[[2,4]]
dmae-block-4-8   digits_dmae  objective.pairs=[[4,8]]
dmae-two-pairs    digits_dmae  objective.pairs=[[2,4],[4,8]]
dmae-l2           digits_dmae  objective.distance=l2
dmae-head-linear  digits_dmae  objective.head=linear
dmae-as-published digits_dmae  objective.head=linear objective.normalize=l2
g2sd-generic      digits_g2sd_generic
sdae              digits_sdae
dino              digits_dino
dino-dmae         digits_dino_dmae
mocov3            digits_mocov3
mocov3-dmae       digits_mocov3_dmae
"
# Classifiers beside the fine-tuned teacher. DeiT's distillation gets the epochs of both of G2SD's stages (G2SD, supplement, Table 2).
CLASSIFIERS="
g2sd-specific     digits_g2sd_specific  student.weights=$OUT/g2sd-generic-seedSEED
deit-distilled    digits_g2sd_specific  student.weights=null optim.layer_decay=1.0 optim.epochs=31
"
# And what fine-tuning without a teacher makes of these.
FINETUNED="g2sd-generic mae dmae"

. launch/digits.sh

train_alone() { # NAME SEED RECIPE [key=value ...]: one process; a finished run is left alone
    local run="$OUT/$1-seed$2"
    [ ! -e "$run/finished" ] || return 0
    mkdir -p "$run"
    dmae-ds train "$3" --resume auto "run.dir=$run" "run.seed=$2" "data.train=$OUT/shards/train" "data.val=$OUT/shards/val" "${@:4}" \
        >"$run.log" 2>&1 || { echo "$run failed:" >&2; tail -5 "$run.log" >&2; return 1; }
    touch "$run/finished"
    echo "trained $run"
}
export -f train_alone
export OUT

in_parallel() { # lines of arguments of `train_alone` on standard input
    xargs -P "$JOBS" -d '\n' -I '{}' bash -c 'train_alone {}'
}

students_of() { # SEED, and settings on standard input: a line of arguments of `train_alone` each
    while read -r name recipe options; do
        [ -n "$name" ] && wanted "$name" || continue
        ! grep -q '^teacher:' "launch/recipes/$recipe.yaml" || options="teacher.weights=$OUT/teacher-seed$1${weights:-} $options"
        echo "'$name' $1 $recipe ${options//SEED/$1}"
    done
}

wanted() { # NAME
    [ -z "$ONLY" ] || [[ " $ONLY " = *" $1 "* ]]
}

finetune() { # RUN: on labels alone
    [ ! -e "$1/finetuned" ] || return 0
    dmae-ds eval finetune "$1" --recipe finetune_digits --resume auto >"$1-finetune.log" 2>&1 || { echo "fine-tuning $1 failed:" >&2; tail -5 "$1-finetune.log" >&2; return 1; }
    touch "$1/finetuned"
    echo "fine-tuned $1"
}
export -f finetune

echo "== teachers"
for seed in $SEEDS; do
    echo "teacher $seed digits_teacher"
done | in_parallel
echo "== students: $(grep -c . <<<"$SETTINGS") settings, seeds $SEEDS"
for seed in $SEEDS; do
    students_of "$seed" <<<"$SETTINGS"
done | in_parallel
echo "== classifiers: the teacher, students on labels alone, students beside the teacher"
for seed in $SEEDS; do
    for name in teacher $FINETUNED; do
        [ ! -e "$OUT/$name-seed$seed/finished" ] || echo "$OUT/$name-seed$seed"
    done
done | xargs -P "$JOBS" -I '{}' bash -c 'finetune {}'
for seed in $SEEDS; do
    weights=/finetune_digits/best.safetensors students_of "$seed" <<<"$CLASSIFIERS"
done | in_parallel

echo "== what they are worth: k-NN with all labels (by the mean of the patch tokens, and by CLS, which is what contrastive objectives train), a logistic probe with all, 10% and 1% of them"
for seed in $SEEDS; do
    runs=$(for run in "$OUT"/*-seed"$seed"; do [ -e "$run/evaluated" ] || echo "$run"; done)
    [ -n "$runs" ] || continue
    # One start for all runs of a seed; the draw of few labels is the seed's too.
    (
        export OMP_NUM_THREADS=$JOBS
        dmae-ds eval knn $runs
        dmae-ds eval knn $runs --pool cls
        dmae-ds eval probe $runs --l2 1e-3 --labels all 10% 1% --subset-seed "$seed"
    ) >"$OUT/evaluation-seed$seed.log" 2>&1 || { tail -5 "$OUT/evaluation-seed$seed.log" >&2; exit 1; }
    for run in $runs; do touch "$run/evaluated"; done
done
dmae-ds report --results "$OUT"
