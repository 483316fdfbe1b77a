#!/usr/bin/env bash
# What one node of a GKE or SkyPilot job runs: a verb, with the flags by which the nodes find each
# other. One process a node, which drives all of the node's devices.
#
#   bash launch/_node.sh VERB [FLAGS OF THE VERB]
#   bash launch/_node.sh --encoded=BASE64     the same words, quoted for a shell, then in base64
#
# Environment:
#   HIPPOCAMPUS_EXPECT_DEVICES   of all nodes together; the run stops if it sees another number
#   JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT, NNODES, NODE_RANK, GPUS_PER_NODE   (xpk, GPUs)
#   SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK, SKYPILOT_NUM_GPUS_PER_NODE
#   HIPPOCAMPUS_MAX_RETRIES      how often in a row a lost peer is worth another start (default: 3)
# On TPUs JAX finds the other workers by itself.
#
# Exit code: that of the program; but 75, after 10 s, 20 s, 40 s …, when it lost its peers (134) in a
# run that can go on, until that has happened too often without a newer checkpoint. The count is kept
# in the run folder (--workdir), which alone outlives a machine.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/_common.sh

case ${1:-} in
  --dry-run)
    dry_run=yes
    shift
    ;;
esac
case ${1:-} in
  --encoded=*) eval "set -- $(printf '%s' "${1#*=}" | base64 -d)" ;;
esac
check_verb "${1:-}"
verb=$1
shift

nodes=1 rank=${TPU_WORKER_ID:-0} coordinator='' gpus=0
if [ -n "${NODE_RANK:-}" ] && [ -n "${NNODES:-}" ]; then
  nodes=$NNODES rank=$NODE_RANK gpus=${GPUS_PER_NODE:-0}
  coordinator=${JAX_COORDINATOR_ADDRESS:-}
  case $coordinator in *:*) ;; *) coordinator=$coordinator:${JAX_COORDINATOR_PORT:-6002} ;; esac
elif [ "${SKYPILOT_NUM_GPUS_PER_NODE:-0}" != 0 ] && [ -z "${TPU_WORKER_ID:-}" ]; then
  nodes=$SKYPILOT_NUM_NODES rank=$SKYPILOT_NODE_RANK gpus=$SKYPILOT_NUM_GPUS_PER_NODE
  coordinator=$(printf '%s\n' "$SKYPILOT_NODE_IPS" | head -n 1):8476
fi

if ! is_collective "$verb"; then
  if [ "$rank" != 0 ]; then
    say "$verb runs on node 0"
    exit 0
  fi
else
  if [ "$nodes" -gt 1 ]; then
    set -- "$@" "--coordinator_address=$coordinator" "--num_processes=$nodes" "--process_id=$rank"
  fi
  expected=${HIPPOCAMPUS_EXPECT_DEVICES:-$((nodes * gpus))}
  if [ "$expected" != 0 ] && ! has_flag --expect_devices "$@"; then
    set -- "$@" "--expect_devices=$expected"
  fi
fi

unset_proxies
unset JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_PORT # said by flags, or found by JAX
export PYTHONUNBUFFERED=1
if [ -n "$dry_run" ]; then python=${HIPPOCAMPUS_READY_PYTHON:-.venv/bin/python}; else ready_python; fi
if [ -n "$dry_run" ]; then
  run "$python" -m "hippocampus.$verb" "$@"
  exit 0
fi
say "\$ $(shell_words "$python" -m "hippocampus.$verb" "$@")"

# How often in a row this node has lost its peers since the run folder last got further, this time
# included; nothing where there is no run to go on with.
count_lost_peers() { # FLAGS...
  local folder='' word step=0 before=0 count=0
  for word in "$@"; do
    case $word in --workdir=*) folder=${word#*=} ;; esac
  done
  [ -f "$folder/config.json" ] || return 0
  for word in "$folder"/steps/*; do
    word=${word##*/}
    case $word in
      *[!0-9]*) ;;
      *) if [ "$word" -gt "$step" ]; then step=$word; fi ;;
    esac
  done
  if [ -f "$folder/.lost_peers_$rank" ]; then
    read -r before count <"$folder/.lost_peers_$rank" || true
    if [ "$step" -gt "$before" ]; then count=0; else step=$before; fi # it may have gone back
  fi
  count=$((count + 1))
  echo "$step $count" >"$folder/.lost_peers_$rank" && echo "$count"
}

program='' early='' asked=''
pass_on() { # SIGNAL
  asked=yes
  if [ -n "$program" ]; then kill -s "$1" "$program" 2>/dev/null || true; else early=$1; fi
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

# In a group of its own: a signal to this shell, or to all of its group, reaches the program once; a
# second one would end it before it has saved.
set -m
"$python" -m "hippocampus.$verb" "$@" </dev/null &
program=$!
set +m
[ -z "$early" ] || pass_on "$early" # it came while the program was being started
code=0 asked=''
wait "$program" || code=$?
while [ -n "$asked" ]; do # a signal ends the wait, not the program
  asked='' again=0
  wait "$program" || again=$?
  [ "$again" = 127 ] || code=$again # 127: the wait before had the code
done

if [ "$code" = "$lost_peer" ]; then
  lost=$(count_lost_peers "$@")
  if [ -n "$lost" ] && [ "$lost" -le "${HIPPOCAMPUS_MAX_RETRIES:-3}" ]; then
    say "the peers were lost; to be started again in $(backoff_seconds "$lost") s"
    sleep "$(backoff_seconds "$lost")"
    code=75
  fi
fi
exit "$code"
