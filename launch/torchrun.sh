#!/usr/bin/env bash
# Start a recipe on every GPU of this machine (PROCESSES=2 says how many, and is needed where there is none):
#     launch/torchrun.sh recipes/pretrain.py experiment=aria_mini
# On several machines, the same on each:
#     NODES=2 NODE_RANK=0 MASTER_ADDR=first-host launch/torchrun.sh recipes/pretrain.py ...
set -euo pipefail

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$gpus}
if [ "$processes" -lt 1 ]; then
    echo "error: no GPU found; set PROCESSES to the number of processes" >&2
    exit 2
fi

if [ "${NODES:-1}" -gt 1 ]; then
    rendezvous=(--nnodes "$NODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
        --master-port "${MASTER_PORT:-29500}")
else
    # Finds a free port, so that two runs share a machine.
    rendezvous=(--standalone)
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "$processes" "$@"
