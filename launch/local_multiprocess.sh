#!/usr/bin/env bash
# Starts one tw-jax command as several processes on this machine, which form one run:
#
#   launch/local_multiprocess.sh PROCESSES DEVICES_EACH VERB [config.yaml] [key=value ...]
#   launch/local_multiprocess.sh 2 4 sft data.rows=8 run_dir=runs/two_processes
#
# On CPU each process gets DEVICES_EACH virtual devices. Process 0 speaks; what the others print
# goes to the file named at the start. If one fails, the rest are stopped.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n 's/^# \{0,1\}//p' "$0" | sed 1d >&2; exit 2; fi
processes=$1 devices=$2
shift 2

tw_jax=${TW_JAX:-tw-jax}
port=${PORT:-$((20000 + RANDOM % 20000))}
log_dir=$(mktemp -d)
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

pids=()
stop() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; }
trap stop INT TERM
for ((index = 1; index < processes; index++)); do
  JAX_PROCESS_ID=$index $tw_jax "$@" >"$log_dir/process_$index.log" 2>&1 &
  pids+=($!)
done
echo "$processes processes, coordinator $JAX_COORDINATOR_ADDRESS, other logs in $log_dir" >&2
JAX_PROCESS_ID=0 $tw_jax "$@" &
pids+=($!)

status=0
for _ in "${pids[@]}"; do
  wait -n || { status=$?; stop; }
done
exit $status
