#!/usr/bin/env bash
# Run a verb on every device of one or more nodes with torchrun.
#
#   launch/torchrun.sh train configs/demo/train.yaml                  all GPUs of this machine (without one: a process)
#   NPROC=2 launch/torchrun.sh train configs/demo/train.yaml          two processes
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh ...     the same line on each node, with its NODE_RANK
#   INTERFACE=ib0 ...                                                 the network interface between the nodes
#   RUN=runs/a launch/torchrun.sh train ... out=runs/a                supervised: see docs/guides/cluster.md
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [[ -n "${INTERFACE:-}" ]]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
supervisor=()
if [[ -n "${RUN:-}" ]]; then supervisor=(python -m launch.supervise --run "$RUN" --); fi
exec "${supervisor[@]}" torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$nproc" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m dit "$@"
