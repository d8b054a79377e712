#!/usr/bin/env bash
# Run a verb with the deepspeed launcher: on this machine, or on the machines of a hostfile over ssh.
#
#   NPROC=2 launch/deepspeed.sh train configs/demo/train.yaml
#   HOSTFILE=hosts.txt launch/deepspeed.sh train configs/train/videos.yaml
set -euo pipefail
hosts=()
if [[ -n "${HOSTFILE:-}" ]]; then hosts=(--hostfile "$HOSTFILE"); fi
if [[ -n "${NPROC:-}" ]]; then hosts+=(--num_gpus "$NPROC"); fi
exec deepspeed "${hosts[@]}" --master_port "${MASTER_PORT:-29500}" --module dit "$@"
