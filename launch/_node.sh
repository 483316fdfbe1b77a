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
# On TPUs JAX finds the other workers by itself.
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
exec "$python" -m "hippocampus.$verb" "$@" # so that a signal to this process reaches the program
