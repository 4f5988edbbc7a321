# Sourced by quickstart.sh, g2sd.sh and study.sh: an environment in $VENV, first on PATH, and the digits as tar shards under $OUT/shards.
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

if [ ! -e "$VENV/installed" ]; then
    echo "== install into $VENV (torch is large: a minute or more)"
    "$PYTHON" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"found Python {v[0]}.{v[1]}, expected 3.10 to 3.12; set PYTHON=python3.12, say")'
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --editable ".[quickstart]"
    touch "$VENV/installed"
fi
PATH="$(cd "$VENV/bin" && pwd):$PATH"

echo "== images -> tar shards"
for part in train val; do
    [ -d "$OUT/images/$part" ] || python launch/digits.py "$OUT/images"
    [ -e "$OUT/shards/$part/manifest.json" ] || dmae-shards make "$OUT/images/$part" "$OUT/shards/$part" --samples-per-shard 500 --overwrite
done

train() { # NAME RECIPE [key=value ...]: into $OUT/NAME with $SEED, on two ranks; on GPUs on as many as there are, two at most
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu
    echo "== train $1 ($2)"
    deepspeed -q --num_gpus "$([ "$gpus" = 1 ] && echo 1 || echo 2)" --module dmae_ds train "$2" --resume auto "run.dir=$OUT/$1" "run.seed=$SEED" \
        "data.train=$OUT/shards/train" "data.val=$OUT/shards/val" "${@:3}"
}
