#!/usr/bin/env bash
# Start a recipe on every GPU of this machine (PROCESSES=2 says how many, and is needed where there is none):
#     launch/torchrun.sh recipes/pretrain.py experiment=aria_mini
# On several machines, the same on each:
#     NODES=2 NODE_RANK=0 MASTER_ADDR=first-host launch/torchrun.sh recipes/pretrain.py ...
# RESTARTS=3 starts all processes again, from the newest checkpoint, after one has died, but not a run that
# was preempted: its exit code, 75, is this script's. PYTHON=python3.12 is another interpreter than `python`.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no recipe given; usage: launch/torchrun.sh recipes/pretrain.py [OVERRIDES]"
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$gpus}
[[ $processes =~ ^[0-9]+$ ]] || fail "PROCESSES=$processes is not a number"
[ "$processes" -gt 0 ] || fail "no GPU found; set PROCESSES to the number of processes"

if [ "${NODES:-1}" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] || fail "NODES=$NODES needs NODE_RANK, 0 on the first machine"
    [ -n "${MASTER_ADDR:-}" ] || fail "NODES=$NODES needs MASTER_ADDR, the address of the first machine"
    rendezvous=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
        --master-port "${MASTER_PORT:-29500}")
else
    # Finds a free port, so that two runs share a machine.
    rendezvous=(--standalone)
fi
exec "${PYTHON:-python}" -m cantata.torchrun "${rendezvous[@]}" --nproc-per-node "$processes" \
    --max-restarts "${RESTARTS:-0}" "$@"
