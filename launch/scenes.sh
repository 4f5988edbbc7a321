#!/usr/bin/env bash
# Scenes of handwritten digits with label maps, boxes and masks (launch/scenes.py) as shards:
#   bash launch/scenes.sh                # OUT=folder; $OUT/shards/scenes/train and val, in seconds
# 1,000 training and 200 validation scenes, in an environment that has dmae-shards, Pillow and scikit-learn.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/checks.sh
expect_no_words OUT=folder "$@"
OUT=${OUT:-.}

[ -e "$OUT/scenes/objectInfo.txt" ] || python launch/scenes.py "$OUT/scenes" --seed "${SCENES_SEED:-0}"
for pair in train:training val:validation; do
    part=${pair#*:}
    dmae-shards make "$OUT/scenes/images/$part" "$OUT/shards/scenes/${pair%:*}" \
        --masks "$OUT/scenes/annotations/$part" --zero-is-unlabelled --classes "$OUT/scenes/objectInfo.txt" \
        --coco "$OUT/scenes/instances_$part.json" --samples-per-shard 250
done
