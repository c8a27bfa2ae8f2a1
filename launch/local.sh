#!/usr/bin/env bash
# Train on N ranks of this machine:  launch/local.sh N CONFIG.yaml [more.yaml] [key=value ...]
# N = number of GPUs, or any number of CPU ranks. Ranks share the cores evenly unless OMP_NUM_THREADS says otherwise.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh RANKS CONFIG.yaml [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
# Restarted workers must not meet the addresses of dead ones (torch 2.13 shares one store over restarts otherwise).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PROTOMEM_AGENT=$$  # exec keeps the process id: workers know their agent by it and end with it
# torchrun prints a stack trace for a worker that ended with an error; the worker has said what was wrong by then.
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node="$ranks" -m protomem train "$@"
