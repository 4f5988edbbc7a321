#!/usr/bin/env bash
# Students on scenes of handwritten digits, three seeds each: mIoU and box AP of random weights, MAE, DMAE and
# G2SD's generic stage, and G2SD's specific stage with and without the teacher:
#   bash launch/scenes_study.sh          # SEEDS="0" for one seed, JOBS=4 runs at a time, OUT=folder
#   ONLY="mae dmae" TASKS="dense" bash launch/scenes_study.sh              # some settings, some evaluations
# All students of a seed have the same steps, data, rate and initial weights, and all seeds one teacher, as
# the papers' students have. Killed or started again, it continues where it was; what is finished is not
# repeated. Numbers go into each run's results.jsonl; the table at the end has their means (RESULTS.md:
# dmae-ds report --results digits=runs/study scenes=runs/scenes).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh
expect_no_words SEEDS=0 "$@"
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-2}
OUT=${OUT:-runs/scenes}
ONLY=${ONLY:-}
TASKS=${TASKS:-}
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

TEACHER=$OUT/teacher-seed0
# Name of the run, its recipe, and the keys that are changed. Random weights are those before the first step.
SETTINGS="
random        scenes_mae   optim.epochs=0.001 optim.warmup_epochs=0 optim.base_lr=1e-12
mae           scenes_mae
dmae          scenes_dmae          teacher.weights=$TEACHER
g2sd-generic  scenes_g2sd_generic  teacher.weights=$TEACHER
"
# Name of an evaluation, the runs that get it (all, or one name), and what follows `dmae-ds eval`. Frozen
# features are measured on images as large as in training.
EVALUATIONS="
dense             all           dense RUN --task knn linear --size 64 --window 64 --patches 50000 --iterations 300 --warmup 30 --lr 1e-2
segment           all           segment RUN --recipe upernet_scenes optim.length=8
segment-frozen    all           segment RUN --recipe upernet_scenes optim.length=8 frozen=true
detect            all           detect RUN --recipe detect_scenes
segment-specific  g2sd-generic  segment RUN --recipe upernet_scenes optim.length=8 distill.teacher=$TEACHER/segment/best.safetensors
detect-specific   g2sd-generic  detect RUN --recipe detect_scenes distill.teacher=$TEACHER/detect/best.safetensors
"

SHARDS=$OUT/shards/scenes
. launch/runs.sh
expect_numbers SEEDS 0 $SEEDS
expect_numbers JOBS 1 $JOBS
expect_names ONLY $ONLY <<<"$SETTINGS"
expect_names TASKS $TASKS <<<"$EVALUATIONS"
expect_plain OUT "$OUT"

. launch/venv.sh
python -c 'import pycocotools, transformers' 2>/dev/null || python -m pip install --quiet --editable ".[dense]"

evaluate() { # TASK RUN what follows `dmae-ds eval`, for one run
    local done="$2/evaluated-$1" command="$3"
    [ ! -e "$done" ] || return 0
    [ "${command%% *}" = dense ] ||
        command+=" --resume auto run.dir=$2/$1 data.train=$SHARDS/train data.val=$SHARDS/val"
    # The words of the table are options without spaces.
    # shellcheck disable=SC2086
    logged "eval $1 of $2" "$2-$1.log" dmae-ds eval ${command//RUN/$2} || return 1
    touch "$done"
    echo "evaluated $2 ($1)"
}
export -f evaluate

evaluations() { # NAME SEED WHOM: lines of arguments of `evaluate`, for a run, of the evaluations for WHOM
    local task whom command
    while read -r task whom command; do
        [ -n "$task" ] && [ "$whom" = "$3" ] || continue
        [ -z "$TASKS" ] || [[ " $TASKS " = *" $task "* ]] || continue
        echo "$task '$OUT/$1-seed$2' '$command'"
    done <<<"$EVALUATIONS"
}

[ -e "$SHARDS/val/manifest.json" ] || OUT=$OUT bash launch/scenes.sh
teacher=
if wanted dmae || wanted g2sd-generic; then teacher=teacher; fi
echo "== students: seeds $SEEDS"
[ -z "$teacher" ] || in_parallel <<<"teacher 0 scenes_teacher"
for seed in $SEEDS; do
    students_of "$seed" <<<"$SETTINGS"
done | in_parallel
echo "== evaluations"
for whom in all one; do # of all first: the specific stage needs the teacher's segmenter and detector
    {
        [ -z "$teacher" ] || evaluations teacher 0 "${whom/one/teacher}"
        for seed in $SEEDS; do
            while read -r name _; do
                [ -n "$name" ] && wanted "$name" || continue
                evaluations "$name" "$seed" "${whom/one/$name}"
            done <<<"$SETTINGS"
        done
    } | xargs -r -P "$JOBS" -d '\n' -I '{}' bash -c 'evaluate {}'
done
dmae-ds report --results "scenes=$OUT" --out "$OUT/RESULTS.md"
sed -n '/^| setting/,/^$/p' "$OUT/RESULTS.md"
