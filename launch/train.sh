#!/usr/bin/env bash
# Start or continue a run on one node or several, and restart it if it breaks. The arguments are those of
# `dmae-ds train`:
#   bash launch/train.sh RECIPE [key=value ...]                           this node's GPUs
#   HOSTFILE=hostfile bash launch/train.sh ...                            on one node; pdsh reaches the others
#   LAUNCHER=no_ssh HOSTFILE=hostfile NODE_RANK=0 MASTER_ADDR=node1 ...   on every node, with its NODE_RANK
#   LAUNCHER=torchrun NODES=2 MASTER_ADDR=node1 ...                       on every node; NODES=1:2 runs on one too
# RESTARTS=3   how often a run that broke is restarted (default 0; for torchrun, its --max_restarts)
# GPUS=8       of this node, without a hostfile (default: all); no_ssh then requires it, and NODES
# PORT=29500   on the first node; two jobs that share a node need two
# CUDA_VISIBLE_DEVICES is respected without a hostfile; a hostfile's slots are GPUs 0, 1, ... of its nodes.
# Over ssh the nodes get variables that begin with PYTHON, NCCL, UCX or MV2, and the lines NAME=value of
# ./.deepspeed_env.
#
# SIGTERM, SIGUSR1 and Ctrl-C let the ranks finish their step and save (a second Ctrl-C: at once, unsaved).
# Exit codes: 0 the run is finished; 2 a mistake in the recipe; 75 stopped by a signal after saving, continue
# with the same command; anything else: it broke.
# Run by tests/multi_node/test_scripts.py, on CPUs.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
. "$(dirname "${BASH_SOURCE[0]}")/checks.sh"
LAUNCHER=${LAUNCHER:-$([ -n "${HOSTFILE:-}" ] && echo pdsh || echo one_node)}
RESTARTS=${RESTARTS:-0}
PORT=${PORT:-29500}

needs() { # VARIABLE ...
    local name
    for name in "$@"; do [ -n "${!name:-}" ] || refuse "LAUNCHER=$LAUNCHER requires $name"; done
}
reads() { # VARIABLE ...: no other is set
    local name
    for name in HOSTFILE GPUS NODES NODE_RANK MASTER_ADDR; do
        [ -z "${!name:-}" ] || [[ " $* " = *" $name "* ]] ||
            refuse "$name=${!name} has no effect with LAUNCHER=$LAUNCHER, which reads $*;" \
                "unset it, or choose another LAUNCHER"
    done
}
gpus() {
    local code='from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_count())'
    python -c "$code" | tail -1
}
too_few() {
    refuse "CUDA_VISIBLE_DEVICES=$visible lists fewer GPUs than GPUS=$GPUS; lower GPUS"
}

[ $# -gt 0 ] || refuse "no recipe was given; name a recipe"
for ((place = 1; place <= $#; place++)); do
    case ${!place} in # argparse takes abbreviations
    -h* | --h* | --d*) refuse "${!place} starts no run; write: dmae-ds train ... ${!place}" ;;
    --r*=*) resume=${!place#*=} ;;
    --r*) next=$((place + 1)) && resume=${!next:-} ;;
    *) continue ;;
    esac
    [ "$resume" = auto ] ||
        refuse "--resume $resume contradicts --resume auto, which every start here adds; remove it, and give" \
            "another run.dir to begin again"
done
expect_numbers RESTARTS 0 "$RESTARTS"
expect_numbers PORT 1 "$PORT"
[ -z "${GPUS:-}" ] || expect_numbers GPUS 1 "$GPUS"
[ -z "${NODE_RANK:-}" ] || expect_numbers NODE_RANK 0 "$NODE_RANK"
if [ "$LAUNCHER" = torchrun ] && [ -n "${NODES:-}" ]; then # also LEAST:MOST
    expect_numbers NODES 1 "${NODES%%:*}" "${NODES#*:}"
elif [ -n "${NODES:-}" ]; then
    expect_numbers NODES 1 "$NODES"
fi
visible=${CUDA_VISIBLE_DEVICES-}
case $LAUNCHER in
one_node)
    [ "${NODES:-}" != 1 ] || NODES=''
    reads GPUS
    # by UUID or MIG, or none: torchrun leaves the variable alone, DeepSpeed's launcher does not
    gpus_are_plain || LAUNCHER=torchrun NODES=1 MASTER_ADDR=127.0.0.1
    ;;
pdsh | no_ssh)
    if [ "$LAUNCHER" = pdsh ]; then
        reads HOSTFILE MASTER_ADDR
    elif [ -n "${HOSTFILE:-}" ]; then
        reads HOSTFILE NODE_RANK MASTER_ADDR
    else
        reads NODES GPUS NODE_RANK MASTER_ADDR
    fi
    [ -z "$visible" ] || [ -z "${HOSTFILE:-}" ] ||
        refuse "CUDA_VISIBLE_DEVICES=$visible cannot be combined with HOSTFILE, whose slots are GPUs" \
            "0, 1, ... of each node; unset it, or use LAUNCHER=torchrun on every node"
    [ -z "$visible" ] || gpus_are_plain ||
        refuse "CUDA_VISIBLE_DEVICES=$visible is no list of numbers, which LAUNCHER=$LAUNCHER requires;" \
            "use LAUNCHER=torchrun on every node"
    # DeepSpeed's launcher would run on this node alone.
    [ -z "${HOSTFILE:-}" ] || { [ -f "$HOSTFILE" ] && [ -r "$HOSTFILE" ]; } ||
        refuse "HOSTFILE '$HOSTFILE' is not a file that can be read; write one as launch/hostfile.example"
    ;;
torchrun) reads NODES MASTER_ADDR GPUS ;;
*) refuse "LAUNCHER=$LAUNCHER is unknown; choose one_node, pdsh, no_ssh, torchrun" ;;
esac
case $LAUNCHER in
one_node)
    GPUS=${GPUS:-$(gpus)}
    deepspeed_here "$GPUS" || too_few
    start+=(--master_port "$PORT" --module)
    ;;
pdsh)
    needs HOSTFILE
    start=(deepspeed --hostfile "$HOSTFILE" --master_port "$PORT"
        ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --module)
    ;;
no_ssh)
    needs NODE_RANK MASTER_ADDR
    if [ -z "${HOSTFILE:-}" ]; then # DeepSpeed requires one; the names in it are not used
        needs NODES GPUS
        [ "$NODE_RANK" -lt "$NODES" ] ||
            refuse "NODE_RANK=$NODE_RANK is not below NODES=$NODES; nodes are counted from 0"
        HOSTFILE=$(mktemp)
        trap 'rm -f "$HOSTFILE"' EXIT
        include='' slots=$GPUS
        if [ -n "$visible" ]; then # by their numbers, which each node reads for itself
            chosen=$(first_gpus "$GPUS") || too_few
            slots=$(($(tr , '\n' <<<"$chosen" | sort -n | tail -1) + 1))
        fi
        for ((node = 0; node < NODES; node++)); do
            echo "node$node slots=$slots"
            include+=${chosen:+@node$node:$chosen}
        done >"$HOSTFILE"
    fi
    start=(deepspeed --hostfile "$HOSTFILE" ${include:+--include "${include#@}"} --no_ssh
        --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$PORT" --module)
    ;;
torchrun)
    needs NODES MASTER_ADDR
    start=(torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-$(gpus)}" --max_restarts "$RESTARTS"
        --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$PORT" --rdzv_id "dmae-$PORT" -m)
    RESTARTS=0
    ;;
esac

# USR1 is for the ranks. The launcher ignores it, and has a session of its own, so that a signal to this
# process group (a terminal's Ctrl-C) does not reach it as well.
child='' stopping='' interrupted=''
stop() { # SIGNAL
    interrupted=yes
    [ -n "$child" ] || exit 75 # nothing is running
    if [ -n "$stopping" ]; then # clusters repeat TERM and USR1, which changes nothing; a second Ctrl-C kills
        [ "$1" != INT ] || kill -KILL -- "-$child"
        return
    fi
    stopping=yes
    echo "train.sh: stopping; the ranks finish their step and save" >&2
    if [ "$LAUNCHER" = torchrun ]; then
        kill -TERM "$child" # its agent signals the ranks, and does not restart them
    else # repeatedly, because ranks that are starting do not handle the signal yet
        (
            trap - TERM INT
            while kill -0 "$child" 2>/dev/null; do
                tell_ranks
                sleep 5
            done
        ) &
    fi
}
tell_ranks() {
    if [ "$LAUNCHER" = pdsh ]; then # the ranks are the children of DeepSpeed's launch.py on every node
        PDSH_RCMD_TYPE=ssh pdsh -w "$(grep -oE '^[^#[:space:]]+' "$HOSTFILE" | paste -sd,)" \
            "pkill -USR1 -P \$(pgrep -d, -u \$(id -u) -f '[d]eepspeed.launcher.launch.*--master_port=$PORT ')"
    else
        kill -USR1 -- "-$child"
    fi
}
trap 'stop TERM' TERM USR1
trap 'stop INT' INT

for ((attempt = 0; ; attempt++)); do
    # Checked first: a node that is restarted alone after the run has finished must not wait for the others.
    ! python -m dmae_ds.train.finished "$@" || exit 0
    # USR1 is ignored in the subshell, and in the launcher that replaces it.
    (trap '' USR1 && exec setsid "${start[@]}" dmae_ds train "$@" --resume auto) &
    child=$!
    while :; do
        interrupted=''
        wait "$child"
        code=$?
        [ -n "$interrupted" ] || break
    done
    child=''
    # `deepspeed` ends with 0 when its launch.py was killed by a signal, so the run folder is checked.
    if [ "$code" = 0 ]; then
        ! python -m dmae_ds.train.finished "$@" || exit 0
        code=1
        echo "train.sh: the launcher ended with exit code 0 before the run was finished" >&2
    fi
    if [ -n "$stopping" ]; then
        # torchrun turns every code of a rank into 1. 246 is a rank that got USR1 before it handled it, or
        # after it saved.
        { [ "$LAUNCHER" != torchrun ] && [ "$code" != 246 ]; } || code=75
        exit "$code"
    fi
    [ "$code" != 2 ] || exit 2
    [ $attempt -lt "$RESTARTS" ] || exit "$code"
    echo "train.sh: the run ended with exit code $code; restart $((attempt + 1)) of $RESTARTS" >&2
    sleep 5 # until the port is free and the other nodes' ranks have ended
done
