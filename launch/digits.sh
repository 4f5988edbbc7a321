# Sourced by quickstart.sh, g2sd.sh and study.sh: the environment of venv.sh, the digits as tar shards
# under $OUT/shards, and `train`.
. launch/venv.sh

echo "== images -> tar shards"
[ -d "$OUT/images" ] || python launch/digits.py "$OUT/images"
for part in train val; do
    shards="$OUT/shards/$part"
    [ -e "$shards/manifest.json" ] ||
        dmae-shards make "$OUT/images/$part" "$shards" --samples-per-shard 500 --overwrite
done

train() { # NAME RECIPE [key=value ...]: into $OUT/NAME, on two ranks; on GPUs one rank each, two at most
    local gpus ranks=2
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
    [ "$gpus" != 1 ] || ranks=1
    if gpus_are_plain; then
        deepspeed_here "$ranks"
        start+=(-q --module)
    else
        start=(torchrun --standalone --nproc_per_node "$ranks" -m)
    fi
    echo "== train $1 ($2)"
    "${start[@]}" dmae_ds train "$2" --resume auto "run.dir=$OUT/$1" \
        "run.seed=$SEED" "data.train=$OUT/shards/train" "data.val=$OUT/shards/val" "${@:3}"
}
