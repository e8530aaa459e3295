#!/usr/bin/env bash
# Several machines by Slurm, one Ray node on each:
#   sbatch --nodes=3 --time=24:00:00 launch/slurm.sh RUN.toml [options of `titan run`]
# Before the time limit Slurm says so; titan then stops after the step under way and saves, and the job goes back into
# the queue, to go on from there. The Python environment and run folder must be at the same path on every machine.
#SBATCH --job-name=titan
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@300
# Seconds before the limit; recovery.grace_s, which is 240, has to be half a minute less.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=titan-%j.log
set -uo pipefail

readonly START_WAIT_S=180 STOP_WAIT_S=10

say() { echo "slurm.sh: $*" >&2; }

main() {
  [ -n "${SLURM_JOB_ID:-}" ] || { say "no Slurm job: sbatch --nodes=N launch/slurm.sh RUN.toml starts one"; return 2; }
  [ $# -gt 0 ] || { say "which run? sbatch ... launch/slurm.sh RUN.toml [options of \`titan run\`]"; return 2; }
  titan=${TITAN:-$SLURM_SUBMIT_DIR/.venv/bin/titan}  # TITAN names another one; Slurm runs a copy of this file elsewhere
  [ -x "$titan" ] || titan=$(command -v titan) || {
    say "no titan in $SLURM_SUBMIT_DIR/.venv or on the PATH: run \`make install\`, or set TITAN to its path"
    return 1
  }
  bin=$(dirname "$titan")
  requeue= titan_pid= children=()
  log=$SLURM_SUBMIT_DIR/titan-$SLURM_JOB_ID-ray.log
  trap on_term TERM
  say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"

  export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
  unset RAY_AUTH_TOKEN_PATH
  RAY_AUTH_TOKEN=$("$bin/python" -c 'import secrets; print(secrets.token_hex(32))') || return 1
  export RAY_AUTH_TOKEN  # srun passes it on with the environment, which only this user can read

  start_cluster && run_titan "$@"
  local code=$?
  stop_cluster
  [ -n "$requeue" ] && [ $code -ne 0 ] && put_back_in_queue
  return $code
}

# The head runs here, on the job's first node; the other nodes are one step.
start_cluster() {
  local host port
  read -r host port < <("$bin/python" -c '
import ray, socket
with socket.socket() as probe:
    probe.bind(("", 0))
    print(ray.util.get_node_ip_address(), probe.getsockname()[1])') || {
    say "Ray cannot be imported by $bin/python"
    return 1
  }
  address=$host:$port
  : >"$log"
  local run_by=()
  ray_node --head --port "$port" --include-dashboard=false
  local deadline=$((SECONDS + START_WAIT_S))
  until grep -q 'Ray runtime started' "$log"; do
    if ! kill -0 "${children[0]}" 2>/dev/null || [ $SECONDS -gt $deadline ]; then
      say "Ray's head on $address does not come up; $log says why"
      return 1
    fi
    sleep 0.5
  done
  [ "$SLURM_NNODES" -gt 1 ] || return 0
  local others=$((SLURM_NNODES - 1))
  run_by=(srun --overlap --nodes=$others --ntasks=$others --ntasks-per-node=1 --exclude="$SLURMD_NODENAME"
    --kill-on-bad-exit=0)
  ray_node --address "$address"
}

# ray_node [options of `ray start`]: in the background, by the command run_by, in a group of its own. A node that does
# not come up is tried again: on a busy host Ray's own wait for it, 30 s, can be too short.
ray_node() {
  # shellcheck disable=SC2016  # expanded on the node
  setsid "${run_by[@]}" bash -c '
    for try in 1 2 3; do
      "$0" start --block --disable-usage-stats --num-cpus "$SLURM_CPUS_ON_NODE" --node-name "$SLURMD_NODENAME" \
        ${TITAN_RAY_OPTIONS:-} "$@" && exit
      echo "slurm.sh: try $try of a Ray node on $SLURMD_NODENAME ended"
    done
    exit 1' "$bin/ray" "$@" >>"$log" 2>&1 &
  children+=($!)
}

run_titan() {
  [ -z "$requeue" ] || return 130  # told to stop before it began
  "$titan" run "$@" --resume --address "$address" --set "cluster.nodes=$SLURM_NNODES" &
  titan_pid=$!
  local code
  while :; do
    wait "$titan_pid"
    code=$?
    kill -0 "$titan_pid" 2>/dev/null || break  # else it was a signal that ended the wait
  done
  titan_pid=
  return $code
}

on_term() {
  requeue=yes
  say "the time is nearly up: titan stops after this step and saves"
  [ -z "$titan_pid" ] || kill -TERM "$titan_pid"
}

# Every process of the head and of srun, which ends those on the other nodes; each leads a group of its own.
stop_cluster() {
  local child deadline=$((SECONDS + STOP_WAIT_S))
  for child in "${children[@]}"; do kill -TERM -- "-$child" 2>/dev/null; done
  for child in "${children[@]}"; do
    while kill -0 -- "-$child" 2>/dev/null && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
    kill -KILL -- "-$child" 2>/dev/null
  done
}

put_back_in_queue() {
  local state
  state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
  if [ "$state" != RUNNING ]; then
    say "job $SLURM_JOB_ID is $state, so it does not go back into the queue"
    return
  fi
  trap '' TERM  # which Slurm sends to what it puts back
  say "job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" ||
    say "job $SLURM_JOB_ID could not be put back; \`titan resume\` goes on from its checkpoint"
}

main "$@"
exit $?
