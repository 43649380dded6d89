#!/usr/bin/env bash
# Training on GKE with JobSet.
#
#   NAME=long IMAGE=... ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 HOSTS=16 WORKDIR=gs://BUCKET/long \
#       launch/gke.sh [--dry-run] tpu
#   NAME=long IMAGE=... ACCELERATOR=nvidia-h200-141gb HOSTS=4 WORKDIR=gs://BUCKET/long \
#       launch/gke.sh [--dry-run] gpu
#
# HOSTS: TPU VMs in a slice, or GPU nodes. Further variables, with what they are by default:
# CONFIG (configs/long.py), CHIPS (on a host: 4, or 8 GPUs), SLICES (1), SERVICE_ACCOUNT (default),
# MAX_RESTARTS (10). --dry-run prints the manifest. To start again after a failure: delete the
# JobSet (kubectl delete jobset NAME), then the same command.
set -euo pipefail

apply=(kubectl apply -f -)
[ "${1:-}" != --dry-run ] || { apply=(cat); shift; }
kind=${1:-}
case $kind in
tpu) CHIPS=${CHIPS:-4} ;;
gpu) CHIPS=${CHIPS:-8} TOPOLOGY=none SLICES=1 ;;
*)
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//' >&2
    exit 2
    ;;
esac
export NAME=${NAME:?a name for the JobSet} IMAGE=${IMAGE:?the image that launch/Dockerfile.tpu or .cuda makes}
export ACCELERATOR=${ACCELERATOR:?the node pool\'s accelerator} HOSTS=${HOSTS:?the number of hosts}
export WORKDIR=${WORKDIR:?a bucket gs://... for checkpoints and metrics} TOPOLOGY=${TOPOLOGY:?as 4x4x4}
export CONFIG=${CONFIG:-configs/long.py} CHIPS SLICES=${SLICES:-1}
export SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} MAX_RESTARTS=${MAX_RESTARTS:-10}
export PROCESSES=$((HOSTS * SLICES)) DEVICES=$((HOSTS * CHIPS * SLICES))

python3 -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ), end="")' \
    < "$(dirname "$0")/gke_jobset_$kind.yaml" | "${apply[@]}"
