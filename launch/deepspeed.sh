#!/usr/bin/env bash
# Start a recipe with DeepSpeed's launcher on every GPU of this machine (PROCESSES=2 says how many, and is
# needed where there is none):
#     launch/deepspeed.sh recipes/pretrain.py experiment=aria_mini engine=deepspeed engine.zero_stage=2
# On several machines, from the first of them, over ssh: HOSTFILE=hosts, with lines such as `host slots=8`.
# The launcher only starts processes; the engine is what the recipe is told, so any engine works.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no recipe given; usage: launch/deepspeed.sh recipes/pretrain.py [OVERRIDES]"
# As torchrun does: processes that each take every core slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
fi

# Unlike torchrun it takes port 29500 whether it is free or not.
launcher=(deepspeed --log_level warning --master_port "${MASTER_PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
    # Without the file it would train on this machine alone.
    [ -r "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE cannot be read"
    exec "${launcher[@]}" --hostfile "$HOSTFILE" "$@"
fi
processes=${PROCESSES:-$gpus}
[[ $processes =~ ^[0-9]+$ ]] || fail "PROCESSES=$processes is not a number"
[ "$processes" -gt 0 ] || fail "no GPU found; set PROCESSES to the number of processes"
exec "${launcher[@]}" --num_gpus "$processes" "$@"
