#!/usr/bin/env bash
# The paper's ablations and the other objectives on handwritten digits, three seeds each, into $OUT/RESULTS.md:
#   bash launch/study.sh                 # SEEDS="0" for one seed, JOBS=4 runs at a time, OUT=folder
#   ONLY="dino mocov3" bash launch/study.sh                                # some settings
#   DATA=clipart bash launch/study.sh    # on drawings of 14 kinds (launch/clipart_study.sh)
#   DATA=clipart TIMES=5 bash launch/study.sh                              # there five times the steps
#   DATA=clipart_rates bash launch/study.sh                                # how its learning rates were chosen
# Some hours on 2 CPU cores after the install. All runs of a seed have the same steps, data and initial
# weights, the ablations also the same rate; another objective has the rate of its recipe. Killed or started
# again, it continues where it was; what is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh
expect_no_words SEEDS=0 "$@"
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-2}
DATA=${DATA:-digits}
TIMES=${TIMES:-1}
[ "$DATA" != digits ] || OUT=${OUT:-runs/study}
[ "$TIMES" = 1 ] || OUT=${OUT:-runs/study_${DATA}_x$TIMES}
OUT=${OUT:-runs/study_$DATA}
SHARDS=$OUT/shards
ONLY=${ONLY:-}
. launch/runs.sh
[[ "$DATA" =~ ^(digits|clipart|clipart_rates)$ ]] ||
    refuse "DATA is '$DATA', expected digits, clipart or clipart_rates"
expect_numbers TIMES 1 $TIMES
[ "$TIMES" = 1 ] || [ "$DATA" = clipart ] || refuse "TIMES=$TIMES is only for DATA=clipart"
expect_numbers SEEDS 0 $SEEDS
expect_numbers JOBS 1 $JOBS
expect_plain OUT "$OUT"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Name of the run, its recipe, and the keys that are changed: the rows of Tables 1 to 4 that make sense at
# this scale.
# Random weights are those before the first step.
SETTINGS="
random            digits_mae   optim.epochs=.001 optim.warmup_epochs=0 optim.base_lr=1e-12
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
tinymim           digits_tinymim
amd               digits_amd
features          digits_features
features-masked   digits_features_masked
mocov3-teacher    digits_mocov3_teacher
"
# Where ONLY names them: on a quarter and on half of the images, at equal steps; a student as wide as its
# teacher, with both heads; five times the steps of a fifth of the visible patches.
MORE="
mae-25            digits_mae   data.share=.25 optim.epochs=64 optim.warmup_epochs=8
mae-50            digits_mae   data.share=.5 optim.epochs=32 optim.warmup_epochs=4
dmae-25           digits_dmae  data.share=.25 optim.epochs=64 optim.warmup_epochs=8
dmae-50           digits_dmae  data.share=.5 optim.epochs=32 optim.warmup_epochs=4
dmae-wide         digits_dmae  student.embed_dim=128
dmae-wide-linear  digits_dmae  student.embed_dim=128 objective.head=linear
dmae-mask-.95-x5  digits_dmae  objective.mask_ratio=.95 optim.epochs=80 optim.warmup_epochs=10
"
[ -z "$ONLY" ] || SETTINGS+=$MORE
# Classifiers that learn from the fine-tuned teacher. DeiT's distillation gets the epochs of both of G2SD's
# stages (G2SD, supplement, Table 2).
CLASSIFIERS="
g2sd-specific     digits_g2sd_specific  student.weights=$OUT/g2sd-generic-seedSEED
deit-distilled    digits_g2sd_specific  student.weights=null optim.layer_decay=1.0 optim.epochs=31
"
# Students of runs above: one that goes on from MAE's; of two teachers, and of each of them alone; with
# DMAE's features stored in 8 bits, and in 8 bits of their 16 main directions.
MOCO=$OUT/mocov3-teacher-seedSEED
CONTINUED="
adapt             digits_adapt         student.weights=$OUT/mae-seedSEED/student.safetensors
one-teacher       digits_one_teacher
one-teacher-moco  digits_one_teacher   teacher.weights=$MOCO
two-teachers      digits_two_teachers  teachers.mae.weights=$OUT/teacher-seedSEED teachers.moco.weights=$MOCO
dmae-int8         digits_dmae          teacher.placement=cache teacher.cache=$OUT/stored-int8-seedSEED
dmae-pca          digits_dmae          teacher.placement=cache teacher.cache=$OUT/stored-pca-seedSEED
"
# Runs that are also fine-tuned on labels alone; baselines that learn from labels and the fine-tuned teacher
# from random weights, whose results are those of `random`.
FINETUNED="teacher g2sd-generic mae dmae"
BASELINES="supervised_crd_digits supervised_srrl_digits"

TEACHER="teacher digits_teacher"
options_of() { echo "${@:2}"; } # RECIPE [key=value ...]: as another data set changes them
[ "$DATA" = clipart_rates ] || expect_names ONLY $ONLY <<<"$TEACHER$SETTINGS$CLASSIFIERS$CONTINUED"
expect_study "DATA=$DATA TIMES=$TIMES"
section=$DATA
case $DATA in
digits) . launch/digits.sh ;;
clipart) . launch/clipart_study.sh ;;
clipart_rates) . launch/clipart_rates.sh ;;
esac

finetune() { # RUN RECIPE [key=value ...]: on labels
    [ ! -e "$1/$2.done" ] || return 0
    logged "fine-tuning $1 ($2)" "$1-$2.log" \
        dmae-ds eval finetune "$1" --recipe "$2" --resume auto "${@:3}" || return 1
    touch "$1/$2.done"
    echo "fine-tuned $1 ($2)"
}
export -f finetune

echo "== teachers"
for seed in $SEEDS; do
    echo "${TEACHER/ / $seed }"
done | in_parallel
echo "== students: $(students_of 0 <<<"$SETTINGS" | grep -c .) settings, seeds $SEEDS"
for seed in $SEEDS; do
    students_of "$seed" <<<"$SETTINGS"
done | in_parallel
store() { # SEED NAME OPTION ...: the teacher's features, for digits_dmae
    [ ! -e "$OUT/stored-$2-seed$1.done" ] || return 0
    logged "storing features ($2)" "$OUT/stored-$2-seed$1.log" dmae-ds teacher cache digits_dmae \
        "$OUT/stored-$2-seed$1" "${@:3}" "run.seed=$1" "data.train=$SHARDS/train" "data.val=$SHARDS/val" \
        $(options_of digits_dmae) "teacher.weights=$OUT/teacher-seed$1" || return 1
    touch "$OUT/stored-$2-seed$1.done"
}
for seed in $SEEDS; do
    ! wanted dmae-int8 || store "$seed" int8 --dtype int8
    ! wanted dmae-pca || store "$seed" pca --dtype int8 --pca 16
    students_of "$seed" <<<"$CONTINUED"
done | in_parallel
echo "== classifiers: the teacher, students on labels alone, students with the teacher"
for seed in $SEEDS; do
    for name in $FINETUNED; do
        [ ! -e "$OUT/$name-seed$seed/finished" ] || echo "'$OUT/$name-seed$seed' finetune_digits"
    done
done | xargs -P "$JOBS" -d '\n' -I '{}' bash -c 'finetune {}'
for seed in $SEEDS; do
    [ -e "$OUT/random-seed$seed/finished" ] || continue
    for recipe in $BASELINES; do
        echo "'$OUT/random-seed$seed' $recipe" \
            "'distill.teacher=$OUT/teacher-seed$seed/finetune_digits/best.safetensors'"
    done
done | xargs -P "$JOBS" -d '\n' -I '{}' bash -c 'finetune {}'
for seed in $SEEDS; do
    weights=/finetune_digits/best.safetensors students_of "$seed" <<<"$CLASSIFIERS"
done | in_parallel

# By the mean of the patch tokens, and by CLS, which is what contrastive objectives train.
evaluate() { # SEED RUN ...: all runs of a seed in one process; few labels are drawn by the seed too
    export OMP_NUM_THREADS=$JOBS
    dmae-ds eval knn "${@:2}" &&
        dmae-ds eval knn "${@:2}" --pool cls &&
        dmae-ds eval probe "${@:2}" --l2 1e-3 --labels all 10% 1% --subset-seed "$1"
}
echo "== evaluation: k-NN with all labels, a logistic probe with all, 10% and 1% of them"
for seed in $SEEDS; do
    runs=()
    for run in "$OUT"/*-seed"$seed"; do
        [ -e "$run/evaluated" ] || [ ! -e "$run/finished" ] || runs+=("$run")
    done
    [ "${#runs[@]}" != 0 ] || continue
    log="$OUT/evaluation-seed$seed.log"
    (evaluate "$seed" "${runs[@]}") >"$log" 2>&1 || { tail -5 "$log" >&2; exit 1; }
    for run in "${runs[@]}"; do touch "$run/evaluated"; done
done
dmae-ds report --results "$section=$OUT" --out "$OUT/RESULTS.md"
sed -n '/^| setting/,/^$/p' "$OUT/RESULTS.md"
