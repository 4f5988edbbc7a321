# Sourced by train.sh and digits.sh: variables that count only before torch is loaded, and which GPUs of this
# node DeepSpeed's launcher may take. Told a number of ranks, it drops CUDA_VISIBLE_DEVICES and takes GPUs
# from 0 on.

# As in dmae_ds/cli/environment.py, which says why.
[ -n "${OMP_WAIT_POLICY+set}" ] || export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
if [ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
fi

gpus_are_plain() { # whether CUDA_VISIBLE_DEVICES is unset or lists numbers, not UUIDs, MIG devices or none
    [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]
}
first_gpus() { # N: the first N of CUDA_VISIBLE_DEVICES; fails where it lists fewer
    local listed
    IFS=, read -ra listed <<<"$CUDA_VISIBLE_DEVICES"
    [ "$1" -le "${#listed[@]}" ] || return 1
    (IFS=, && echo "${listed[*]:0:$1}")
}
deepspeed_here() { # RANKS: sets `start` to DeepSpeed's launcher for so many ranks of this node
    local gpus
    start=(deepspeed --num_gpus "$1")
    [ -n "${CUDA_VISIBLE_DEVICES+set}" ] || return 0
    gpus=$(first_gpus "$1") || return 1
    start=(env -u CUDA_VISIBLE_DEVICES deepspeed --include "localhost:$gpus")
}
