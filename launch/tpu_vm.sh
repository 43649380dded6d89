#!/usr/bin/env bash
# Training on Cloud TPU VMs, asked for as a queued resource.
#
#   NAME=long ZONE=... TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 launch/tpu_vm.sh [--dry-run] create
#   NAME=long ZONE=... launch/tpu_vm.sh [--dry-run] setup
#   NAME=long ZONE=... launch/tpu_vm.sh [--dry-run] run --config=configs/long.py --workdir=gs://BUCKET/long
#   NAME=long ZONE=... launch/tpu_vm.sh [--dry-run] stop | status | delete
#
# create waits for nothing: ask `status` until it is ACTIVE. setup copies this folder to every host
# and installs it; again after a change. run is the same command on every host, and to go on after
# a failure. stop sends SIGTERM: the state is saved. SLICES=n: several slices. SPOT=1: may be
# taken away. PROJECT: other than gcloud's.
set -euo pipefail

run=()
[ "${1:-}" != --dry-run ] || { run=(printf '%q '); shift; }
call() {
    if [ "${#run[@]}" -gt 0 ]; then
        "${run[@]}" "$@"
        echo
    else
        "$@"
    fi
}

action=${1:-}
[ $# = 0 ] || shift
case $action in
create | setup | run | stop | status | delete) ;;
*)
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//' >&2
    exit 2
    ;;
esac
NAME=${NAME:?a name for the resource}
where=("--zone=${ZONE:?a zone}" ${PROJECT:+"--project=$PROJECT"})
SLICES=${SLICES:-1}
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

nodes=("$NAME")
if [ "$SLICES" -gt 1 ]; then
    nodes=()
    for ((i = 0; i < SLICES; i++)); do nodes+=("$NAME-$i"); done
fi

# The same command on all hosts of all slices at once; fails when it fails on one.
everywhere() {
    local pids=() status=0 node pid
    for node in "${nodes[@]}"; do
        call "${vm[@]}" ssh "$node" "${where[@]}" --worker=all "--command=$1" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    return "$status"
}

case $action in
create)
    ids=("--node-id=$NAME")
    [ "$SLICES" = 1 ] || ids=("--node-prefix=$NAME" "--node-count=$SLICES")
    call "${queue[@]}" create "$NAME" "${ids[@]}" "${where[@]}" \
        "--accelerator-type=${TYPE:?as v5p-128}" "--runtime-version=${RUNTIME:?as v2-alpha-tpuv5}" \
        ${SPOT:+--spot}
    ;;
setup)
    root=$(cd "$(dirname "$0")/.." && pwd)
    archive=${TMPDIR:-/tmp}/storm_jax_code.tar.gz
    call tar -czf "$archive" -C "$root" --exclude=./.git --exclude='./.venv*' \
        --exclude=./runs --exclude=./data .
    for node in "${nodes[@]}"; do
        call "${vm[@]}" scp "$archive" "$node:storm_jax_code.tar.gz" "${where[@]}" --worker=all
    done
    everywhere "mkdir -p storm_jax && tar -xzf storm_jax_code.tar.gz -C storm_jax && cd storm_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'"
    ;;
run)
    [ $# -gt 0 ] || { echo "run needs the arguments of storm_jax.train" >&2; exit 2; }
    everywhere "cd storm_jax && exec .venv/bin/python -m storm_jax.train $(printf '%q ' "$@")"
    ;;
stop) everywhere "pkill -TERM -o -f storm_jax.train" ;;
status) call "${queue[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)" ;;
delete) call "${queue[@]}" delete "$NAME" "${where[@]}" --force --quiet ;;
esac
