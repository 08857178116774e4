#!/bin/bash
# The published run on one machine: ResNet-50, 103,793 locations, 200 epochs, all of its GPUs.
#     cromss prepare /data/ssl4eo-s12 /scratch/ssl4eo-s12        first, once
#     scripts/pretrain-torchrun.sh /scratch/ssl4eo-s12 full      again, the same, to go on after an interruption
# On several machines start it on each, with the same NODES and RENDEZVOUS=host:port of one of them. scripts/README.md has the hours and the storage.
set -eu
STORE=${1:?give the store: scripts/pretrain-torchrun.sh STORE NAME [options of cromss pretrain]}
NAME=${2:?give the run a name: scripts/pretrain-torchrun.sh STORE NAME [options of cromss pretrain]}
export OMP_NUM_THREADS=1      # the data workers are processes

rendezvous=(--standalone)
[ "${NODES:-1}" -gt 1 ] && rendezvous=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "$NAME" --rdzv-endpoint "${RENDEZVOUS:?host:port of one machine}")

exec torchrun "${rendezvous[@]}" --nproc-per-node "${PROCESSES:-gpu}" --no-python \
    cromss pretrain --preset paper --precision bf16-mixed --norm per-sensor \
    --data "$STORE" --name "$NAME" --resume auto --num-workers "${WORKERS:-10}" "${@:3}"
