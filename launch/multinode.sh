#!/usr/bin/env bash
# Train on several machines. Start the same line on every one of them, with the same HEAD:
#   HEAD=node0:29400 NODES=4 launch/multinode.sh CONFIG.yaml [more.yaml] [key=value ...]
#   HEAD   host:port of one of the machines, where the others meet; when that machine is lost, all end: start them again
#   NODES  number of machines, or min:max: the job goes on from its last checkpoint when one is lost or comes back
#          (start the same line on it again); a machine leaves in order when its launcher gets SIGTERM
#   RANKS  processes per machine (default: one per GPU, or 1)
#   RESTARTS   how often a machine may begin anew after a loss or failure, its own or another's (default 10);
#          not after a mistake in the settings or the data that is found when the job starts, unless NODES=min:max
#   LAST_CALL  seconds that a start or restart with fewer than max machines waits for more (default 30)
#   KEEP_ALIVE seconds between signs of life of a machine; after three that are missing it counts as lost (default 5)
#   JOB    a name that differs between jobs sharing a HEAD (default protomem)
# The output folder and the data must be at the same paths on all machines, the output folder shared between them.
# The network interface, if there are several: export GLOO_SOCKET_IFNAME=eth0, with GPUs also NCCL_SOCKET_IFNAME=eth0
# (checkpoints are agreed on by gloo).
# A lost rank is noticed within distributed.timeout_s; HEAD must be a name or address that its own machine knows itself by.
set -euo pipefail
if [ $# -lt 1 ] || [ -z "${HEAD:-}" ] || [ -z "${NODES:-}" ]; then
  echo "usage: HEAD=host:port NODES=4 launch/multinode.sh CONFIG.yaml [key=value ...]   (see the top of this file)" >&2
  exit 2
fi
gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
# Restarted workers must not meet the addresses of dead ones (torch 2.13 shares one store over restarts otherwise).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ $NODES == *:* ]]; then
  export PROTOMEM_ELASTIC=1  # when another machine leaves, workers save, and their agent starts them anew
fi
export PROTOMEM_AGENT=$$  # exec keeps the process id: workers know their agent by it and end with it
exec "${PYTHON:-python3}" -m protomem.torchrun --nnodes="$NODES" --nproc-per-node="$ranks" \
  --max-restarts="${RESTARTS:-10}" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-protomem}" \
  --rdzv-conf="last_call_timeout=${LAST_CALL:-30},keep_alive_interval=${KEEP_ALIVE:-5}" \
  -m protomem train "$@"
