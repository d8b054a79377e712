#!/usr/bin/env bash
# Run a verb with the deepspeed launcher: on this machine, or on the machines of a hostfile.
#
#   NPROC=2 launch/deepspeed.sh train configs/demo/train.yaml
#   HOSTFILE=hosts.txt launch/deepspeed.sh train configs/train/videos.yaml           over ssh (needs pdsh)
#   HOSTFILE=hosts.txt NODE_RANK=0 MASTER_ADDR=host0 launch/deepspeed.sh ...         without ssh: the same line on each node, with its NODE_RANK
#   INTERFACE=ib0 ...                                                                the network interface between the nodes
# A line of a hostfile: host0 slots=8
set -euo pipefail
if [[ -n "${INTERFACE:-}" ]]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
options=(--master_port "${MASTER_PORT:-29500}")
if [[ -n "${HOSTFILE:-}" ]]; then options+=(--hostfile "$HOSTFILE"); fi
if [[ -n "${NODE_RANK:-}" ]]; then options+=(--no_ssh --node_rank "$NODE_RANK"); fi
if [[ -n "${MASTER_ADDR:-}" ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
if [[ -n "${NPROC:-}" ]]; then options+=(--num_gpus "$NPROC"); fi
exec deepspeed "${options[@]}" --module dit "$@"
