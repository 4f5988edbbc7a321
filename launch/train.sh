#!/usr/bin/env bash
# Start a run or continue it, on one node or many; start it again when it broke. The arguments are those of `dmae-ds train`:
#   bash launch/train.sh RECIPE [key=value ...]                            this node's GPUs
#   HOSTFILE=hostfile bash launch/train.sh ...                             on one node; the others are reached over ssh, by pdsh
#   LAUNCHER=no_ssh HOSTFILE=hostfile NODE_RANK=0 MASTER_ADDR=node1 ...    on every node, each with its own NODE_RANK
#   LAUNCHER=torchrun NODES=2 MASTER_ADDR=node1 ...                        on every node; NODES=1:2 goes on with what is left
# RESTARTS=3   how often a run that broke is started again (default 0; under torchrun it is --max_restarts)
# GPUS=8       of this node, where there is no hostfile (default: all); no_ssh without a hostfile needs NODES and GPUS
# PORT=29500   on the first node; two jobs that share a node need two
# To all nodes over ssh go the variables that begin with PYTHON, NCCL, UCX or MV2, and the lines NAME=value of ./.deepspeed_env.
#
# SIGTERM, SIGUSR1 and Ctrl-C let the ranks finish their step and save (Ctrl-C again: at once, unsaved).
# Exit codes: 0 the run is finished; 2 a mistake in the recipe; 75 stopped by a signal after saving, continue with the same
# command; anything else: it broke.
# Run by tests/multi_node/test_scripts.py, on CPUs.
set -uo pipefail
LAUNCHER=${LAUNCHER:-$([ -n "${HOSTFILE:-}" ] && echo pdsh || echo one_node)}
RESTARTS=${RESTARTS:-0}
PORT=${PORT:-29500}

mistake() {
    echo "train.sh: $*" >&2
    exit 2
}
needs() { # VARIABLE ...
    local name
    for name in "$@"; do [ -n "${!name:-}" ] || mistake "LAUNCHER=$LAUNCHER needs $name"; done
}
gpus() {
    python -c 'from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_count())' | tail -1
}

[ $# -gt 0 ] || mistake "name a recipe"
case $LAUNCHER in
one_node) start=(deepspeed --num_gpus "${GPUS:-$(gpus)}" --master_port "$PORT" --module) ;;
pdsh)
    needs HOSTFILE
    start=(deepspeed --hostfile "$HOSTFILE" --master_port "$PORT" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --module)
    ;;
no_ssh)
    needs NODE_RANK MASTER_ADDR
    if [ -z "${HOSTFILE:-}" ]; then # DeepSpeed wants one; the names in it stay unused
        needs NODES GPUS
        HOSTFILE=$(mktemp)
        trap 'rm -f "$HOSTFILE"' EXIT
        for ((node = 0; node < NODES; node++)); do echo "node$node slots=$GPUS"; done >"$HOSTFILE"
    fi
    start=(deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$PORT" --module)
    ;;
torchrun)
    needs NODES MASTER_ADDR
    start=(torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-$(gpus)}" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$PORT"
        --rdzv_id "dmae-$PORT" --max_restarts "$RESTARTS" -m)
    RESTARTS=0
    ;;
*) mistake "LAUNCHER=$LAUNCHER is unknown; choose one_node, pdsh, no_ssh, torchrun" ;;
esac

# USR1 is for the ranks. The launcher ignores it, and sits in a session of its own, so that a signal to our process group (a
# terminal's Ctrl-C) doesn't reach it as well.
child='' stopping='' interrupted=''
stop() { # SIGNAL
    interrupted=yes
    [ -n "$child" ] || exit 75 # nothing is running
    if [ -n "$stopping" ]; then # ranks take no notice of a second TERM or USR1, which clusters like to send; a person means it
        [ "$1" != INT ] || kill -KILL -- "-$child"
        return
    fi
    stopping=yes
    echo "train.sh: stopping; the ranks finish their step and save" >&2
    if [ "$LAUNCHER" = torchrun ]; then
        kill -TERM "$child" # its agent tells the ranks, and doesn't start them again
    else # again and again, for ranks that are only starting don't listen yet
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
    if [ "$LAUNCHER" = pdsh ]; then # they are the children of DeepSpeed's launch.py on every node
        PDSH_RCMD_TYPE=ssh pdsh -w "$(grep -oE '^[^#[:space:]]+' "$HOSTFILE" | paste -sd,)" \
            "pkill -USR1 -P \$(pgrep -d, -u \$(id -u) -f '[d]eepspeed.launcher.launch.*--master_port=$PORT ')"
    else
        kill -USR1 -- "-$child"
    fi
}
trap 'stop TERM' TERM USR1
trap 'stop INT' INT

for ((attempt = 0; ; attempt++)); do
    # Asked first, so that a node that is started again alone, after all are through, waits for nobody.
    ! python -m dmae_ds.train.finished "$@" || exit 0
    # In the subshell USR1 is ignored, and stays so in what it becomes.
    (trap '' USR1 && exec setsid "${start[@]}" dmae_ds train "$@" --resume auto) &
    child=$!
    while :; do
        interrupted=''
        wait "$child"
        code=$?
        [ -n "$interrupted" ] || break
    done
    child=''
    # `deepspeed` says 0 when its launch.py was killed by a signal: the run itself is asked.
    if [ "$code" = 0 ]; then
        ! python -m dmae_ds.train.finished "$@" || exit 0
        code=1
        echo "train.sh: the launcher ended with exit code 0 before the run was finished" >&2
    fi
    if [ -n "$stopping" ]; then
        # torchrun turns every code of a rank into 1; 246 is a rank that met USR1 before it had begun, or again after it had saved.
        { [ "$LAUNCHER" != torchrun ] && [ "$code" != 246 ]; } || code=75
        exit "$code"
    fi
    [ "$code" != 2 ] || exit 2
    [ $attempt -lt "$RESTARTS" ] || exit "$code"
    echo "train.sh: the run ended with exit code $code; restart $((attempt + 1)) of $RESTARTS" >&2
    sleep 5 # lets the port and the other nodes' ranks go
done
