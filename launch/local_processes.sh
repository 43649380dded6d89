#!/usr/bin/env bash
# Several processes on this machine, each with simulated CPU devices: what a pod does, without one.
#
#   launch/local_processes.sh [--dry-run] PROCESSES DEVICES COMMAND...
#
# for example
#
#   launch/local_processes.sh 2 4 python -m storm_jax.train --config=configs/debug.py --workdir=DIR
#
# DEVICES is per process. When one process fails, the others are ended and its status is returned.
# SIGTERM to this script reaches all of them. Set STORM_PORT to choose the port of process 0.
set -euo pipefail

dry=
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
if [ $# -lt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//' >&2
    exit 2
fi
processes=$1 devices=$2
shift 2

export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
port=${STORM_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export STORM_COORDINATOR=127.0.0.1:$port STORM_PROCESSES=$processes
export STORM_EXPECT_PROCESSES=$processes STORM_EXPECT_DEVICES=$((processes * devices))

if [ -n "$dry" ]; then
    for ((i = 0; i < processes; i++)); do
        echo "STORM_COORDINATOR=$STORM_COORDINATOR STORM_PROCESSES=$processes STORM_PROCESS_ID=$i" \
            "STORM_EXPECT_PROCESSES=$processes STORM_EXPECT_DEVICES=$STORM_EXPECT_DEVICES" \
            "JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo XLA_FLAGS='${XLA_FLAGS# }' $*"
    done
    exit
fi

pids=()
for ((i = 0; i < processes; i++)); do
    if [ "$i" = 0 ]; then
        STORM_PROCESS_ID=0 "$@" &
    else
        STORM_PROCESS_ID=$i "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    fi
    pids+=($!)
done
stop() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM
trap 'stop INT' INT

# A signal interrupts `wait` with a status above 128: then the processes are still to be waited for.
status=0
while [ "${#pids[@]}" -gt 0 ]; do
    code=0
    wait -n "${pids[@]}" || code=$?
    left=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then left+=("$pid"); fi
    done
    [ "${#left[@]}" -lt "${#pids[@]}" ] || continue
    pids=("${left[@]}")
    if [ "$code" != 0 ] && [ "$status" = 0 ]; then
        status=$code
        if [ "$code" != 75 ]; then # 75: all of them were asked to stop, and are saving
            sleep 3 # what they say last
            stop KILL
        fi
    fi
done
exit "$status"
