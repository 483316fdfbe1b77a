#!/usr/bin/env bash
# Runs a verb as several processes of this machine that find each other over loopback: what a slice
# or a cluster does, before you pay for one. Or as one process for each GPU.
#
#   launch/local_multiprocess.sh [OPTIONS] VERB [FLAGS OF THE VERB]
#   launch/local_multiprocess.sh --processes=2 --devices=4 train --config=configs/quickstart.py
#   launch/local_multiprocess.sh --gpus=8 train --config=configs/quickstart.py
#
# Options:
#   --processes=N      how many processes (default: 2)
#   --devices=M        virtual CPU devices of each (default: 1)
#   --gpus=N           instead of these: N processes with one GPU each
#   --port=PORT        of the coordinator (default: a free one)
#   --grace=SECONDS    how long the others may work on once one has ended well (default: 60)
#   --dry-run          print the commands, run none
#
# Verbs: train and evaluate run on all processes; probe and sample on one.
# Process 0 writes to the terminal; what the others say is shown when one fails.
# Exit code: 64 or 66 if a process says so, else the first failure, else 75 if one was stopped or all
# that is known is that a peer was lost (134), else 0. SIGTERM and Ctrl-C reach every process once, which ends them at the same step.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/_common.sh

processes=2 devices=1 gpus='' port='' grace=60
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage "launch/local_multiprocess.sh"; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    -*) unknown_option "$1" ;;
    *) break ;;
  esac
  shift
done
check_verb "${1:-}"
verb=$1
shift
if [ -n "$gpus" ]; then
  need_number --gpus "$gpus"
  processes=$gpus devices=1
fi
need_number --processes "$processes"
need_number --devices "$devices"
need_number --grace "$grace"
[ -z "$port" ] || need_number --port "$port"

# --- The commands --------------------------------------------------------------------------------

if [ -n "$dry_run" ]; then python=${HIPPOCAMPUS_READY_PYTHON:-.venv/bin/python}; else ready_python; fi
if ! is_collective "$verb"; then
  processes=1
elif [ -z "$port" ]; then
  if [ -n "$dry_run" ]; then
    port=PORT
  else
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  fi
fi
unset_proxies
unset_schedulers
export PYTHONUNBUFFERED=1 # or the last lines of a process that aborts are lost

# Leaves the command of process $1 in ${command[@]}.
command_of() { # I FLAGS...
  local i=$1
  shift
  command=(env)
  if [ -z "$gpus" ]; then
    command+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  elif is_collective "$verb"; then
    # Not CUDA_VISIBLE_DEVICES: NCCL wants to see the other GPUs of the machine.
    command+=("JAX_LOCAL_DEVICE_IDS=$i")
  fi
  if is_collective "$verb"; then
    # By default the coordinator listens on every interface, and asks nobody for a name.
    command+=("JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port")
  fi
  command+=("$python" -m "hippocampus.$verb" "$@")
  if is_collective "$verb"; then
    command+=("--coordinator_address=127.0.0.1:$port" "--num_processes=$processes"
      "--process_id=$i")
    has_flag --expect_devices "$@" || command+=("--expect_devices=$((processes * devices))")
  fi
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$@"
    run "${command[@]}"
  done
  exit 0
fi

# --- The processes -------------------------------------------------------------------------------

logs=$(mktemp -d "${TMPDIR:-/tmp}/hippocampus.XXXXXX")
pids=() codes=() killed=''
asked='' # the signal that a person or a scheduler has sent

signal_running() { # SIGNAL
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [ -n "${codes[i]}" ] || kill -s "$1" -- "${2:-}${pids[i]}" 2>/dev/null || true
  done
}

# shellcheck disable=SC2317,SC2329 # the traps call it
pass_on() { # SIGNAL
  asked=$1
  signal_running "$1"
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'signal_running KILL -' EXIT

# Each in a process group of its own: Ctrl-C on a terminal reaches this script alone, which passes
# it on once; a second one would end the processes before they have saved.
set -m
for ((i = 0; i < processes; i++)); do
  command_of "$i" "$@"
  if [ "$i" = 0 ]; then
    say "\$ $(shell_words "${command[@]}")"
    "${command[@]}" </dev/null &
  else
    "${command[@]}" </dev/null >"$logs/process-$i.log" 2>&1 &
  fi
  pids+=($!)
  codes+=('')
done
set +m
[ -z "$asked" ] || signal_running "$asked" # it came while they were being started

running=$processes deadline='' counted=()
while [ "$running" -gt 0 ]; do
  for ((i = 0; i < processes; i++)); do
    if [ -z "${codes[i]}" ] && ! kill -0 "${pids[i]}" 2>/dev/null; then
      codes[i]=0
      wait "${pids[i]}" || codes[i]=$?
      running=$((running - 1))
      # What ends because it was told to, after another had failed, says nothing of its own.
      [ -n "$killed" ] || counted+=("${codes[i]}")
    fi
  done
  [ "$running" -gt 0 ] || break
  pause
  [ "${#counted[@]}" -gt 0 ] || continue
  case $(what_next "$(combined_code "${counted[@]}")") in
    'done' | again) : "${deadline:=$((SECONDS + grace))}" ;;
    *)
      if [ -z "$killed" ]; then
        [ "$running" = 0 ] || say "a process has failed; the others are told to end"
        killed=yes deadline=$((SECONDS + 10))
        signal_running TERM
      fi
      ;;
  esac
  if [ "$SECONDS" -ge "$deadline" ]; then
    say "killing what still runs"
    signal_running KILL -
  fi
done
trap - EXIT TERM INT

code=$(combined_code "${counted[@]}")
case $code in
  0 | 75) rm -rf "$logs" ;;
  *)
    said=''
    for ((i = 1; i < processes; i++)); do
      words=$(tail -n 5 "$logs/process-$i.log")
      if [ "${codes[i]}" != 0 ] && [ -n "$words" ] && [ "$words" != "$said" ]; then
        say "process $i ended with ${codes[i]}; its last lines, of $logs/process-$i.log:"
        printf '%s\n' "$words" | sed 's/^/  /' >&2
        said=$words
      fi
    done
    ;;
esac
if [ "$code" = "$lost_peer" ]; then
  say "a process lost its peers: start the same command again to go on from the newest checkpoint"
  code=75
fi
exit "$code"
