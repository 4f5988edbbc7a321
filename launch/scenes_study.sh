#!/usr/bin/env bash
# Students on scenes of handwritten digits, three seeds each: mIoU of random weights, MAE and DMAE:
#   bash launch/scenes_study.sh          # SEEDS="0" for one seed, JOBS=4 runs at a time, OUT=folder
#   ONLY="mae dmae" TASKS="dense" bash launch/scenes_study.sh              # some settings, some evaluations
# On one core of a busy machine the teacher took 42 minutes and MAE 7. All students of a seed have the
# same steps, data, rate and initial weights. Killed or started again, it continues where it was; what is
# finished is not repeated. Numbers go into each run's results.jsonl; the table at the end has their means.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-2}
OUT=${OUT:-runs/scenes}
ONLY=${ONLY:-}
TASKS=${TASKS:-}
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Name of the run, its recipe, and the keys that are changed. Random weights are those before the first step.
SETTINGS="
random  scenes_mae   optim.epochs=0.001 optim.warmup_epochs=0 optim.base_lr=1e-12
mae     scenes_mae
dmae    scenes_dmae
"
# Name of an evaluation, and what follows `dmae-ds eval`; images are as large as in training.
EVALUATIONS="
dense  dense RUN --task knn linear --size 64 --window 64 --patches 50000 --iterations 1000 --warmup 50 --lr 1e-2
"

. launch/venv.sh
SHARDS=$OUT/shards/scenes
. launch/runs.sh

evaluate() { # TASK RUN what follows `dmae-ds eval`, for one run
    [ ! -e "$2/evaluated-$1" ] || return 0
    # The words of the table are options without spaces.
    # shellcheck disable=SC2086
    logged "eval $1 of $2" "$2-$1.log" dmae-ds eval ${3//RUN/$2} || return 1
    touch "$2/evaluated-$1"
    echo "evaluated $2 ($1)"
}
export -f evaluate

[ -e "$SHARDS/val/manifest.json" ] || OUT=$OUT bash launch/scenes.sh
echo "== students: seeds $SEEDS"
for seed in $SEEDS; do
    ! wanted dmae || echo "teacher $seed scenes_teacher"
done | in_parallel
for seed in $SEEDS; do
    students_of "$seed" <<<"$SETTINGS"
done | in_parallel
echo "== evaluations"
for seed in $SEEDS; do
    while read -r name _; do
        [ -n "$name" ] && wanted "$name" || continue
        while read -r task command; do
            [ -n "$task" ] && { [ -z "$TASKS" ] || [[ " $TASKS " = *" $task "* ]]; } || continue
            echo "$task '$OUT/$name-seed$seed' '$command'"
        done <<<"$EVALUATIONS"
    done <<<"$SETTINGS"
done | xargs -P "$JOBS" -d '\n' -I '{}' bash -c 'evaluate {}'

python - "$OUT" <<'PYTHON'
import sys
from pathlib import Path
from statistics import fmean, stdev

from dmae_ds.evaluate.results import METRICS, headline, read_results
from dmae_ds.output.table import text_table

values = {}
for run in sorted(Path(sys.argv[1]).glob("*-seed*/")):
    for result in read_results(run):
        values.setdefault((run.name.rpartition("-seed")[0], result["metric"]), []).append(headline(result))
metrics = [metric for metric in METRICS if any(metric == other for _, other in values)]
rows = [("setting", *(METRICS[metric].title for metric in metrics))]
for setting in dict.fromkeys(setting for setting, _ in values):
    cells = []
    for metric in metrics:
        numbers = values.get((setting, metric), [])
        deviation = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
        cells.append(f"{fmean(numbers):.1f}{deviation}" if numbers else "")
    rows.append((setting, *cells))
print("\n".join(text_table(rows)))
PYTHON
