#!/usr/bin/env bash
# A TPU VM or a pod slice, from making it to deleting it. Runs where gcloud is logged in.
#
#   launch/tpu_vm/tpu_vm.sh ACTION --name=NAME --zone=ZONE [OPTIONS] [VERB [FLAGS OF THE VERB]]
#
#   launch/tpu_vm/tpu_vm.sh create  --name=demo --zone=us-central2-b --type=v4-8 --spot
#   launch/tpu_vm/tpu_vm.sh setup   --name=demo --zone=us-central2-b
#   launch/tpu_vm/tpu_vm.sh run     --name=demo --zone=us-central2-b --type=v4-8 \
#       train --config=configs/quickstart.py
#   launch/tpu_vm/tpu_vm.sh logs    --name=demo --zone=us-central2-b --follow
#   launch/tpu_vm/tpu_vm.sh babysit --name=demo --zone=us-central2-b --type=v4-8 --spot \
#       --bucket=mine train --config=configs/quickstart.py --workdir=/mnt/runs/demo
#
# Actions:
#   create    makes the slice
#   setup     copies this checkout to every worker and installs it there, with Python 3.12
#   run       train, evaluate: starts on every worker and returns; the run outlives the connection
#             probe, sample: run on worker 0, and you see what they print
#   logs      the end of the log of worker 0, or of --worker
#   status    the state of the slice and of the run on every worker
#   stop      asks the run to save and end (SIGTERM on every worker)
#   delete    deletes the slice, and with it whatever lies on its disks
#   babysit   all of this until the run is done: makes the slice, starts the run, starts it again when
#             it stops, makes the slice again when it is preempted. Start it where it can stay, such
#             as in tmux; ended and started again, it takes up the run that it finds.
#
# Options:
#   --name=NAME --zone=ZONE [--project=PROJECT]
#   --type=TYPE            v4-8, v5litepod-16, v6e-8 …; with it a run checks that no chip is missing
#   --version=VERSION      of the image (default: the one for the type)
#   --spot                 cheaper, and may be taken back at any time
#   --queued               as a queued resource: waits in line for the slice
#   --create_flag=FLAG     another flag for create, such as --create_flag=--network=mine (repeatable)
#   --bucket=BUCKET        setup mounts it at /mnt/runs on every worker: what lies there stays when
#                          the slice goes; give a run --workdir=/mnt/runs/NAME
#   --env=NAME=VALUE       a variable for the run (repeatable)
#   --internal             connect over the internal addresses
#   --worker=W --lines=N --follow      for logs
#   --grace=SECONDS        for stop: how long saving may take (default: 120)
#   --poll=SECONDS --max_failures=N    for babysit (defaults: 60 and 5, in a row)
#   --dry-run              print the commands, run none
#
# Exit codes: 64 wrong arguments; babysit: 0 done, 64 or 66 as the run says, 75 stopped by a person,
# else what failed too often in a row.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
. launch/_common.sh
. launch/tpu_vm/_slice.sh
. launch/tpu_vm/_babysit.sh

# --- Arguments -----------------------------------------------------------------------------------

name='' zone='' project='' type='' version='' spot='' queued='' internal='' bucket=''
worker=0 lines=50 follow='' grace=120 poll=60 max_failures=5
create_flags=() variables=()

action=${1:-}
case $action in
  --help | -h) usage launch/tpu_vm/tpu_vm.sh; exit 0 ;;
  create | setup | run | logs | status | stop | delete | babysit) shift ;;
  '') die 64 "no action is given" "one of create, setup, run, logs, status, stop, delete, babysit" ;;
  *) die 64 "there is no action '$action'" \
    "one of create, setup, run, logs, status, stop, delete, babysit" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage launch/tpu_vm/tpu_vm.sh; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --internal) internal=yes ;;
    --bucket=*) bucket=${1#*=} ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --env=*=*) variables+=("${1#*=}") ;;
    --worker=*) worker=${1#*=} ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow=yes ;;
    --grace=*) grace=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --max_failures=*) max_failures=${1#*=} ;;
    -*) unknown_option "$1" ;;
    *) break ;;
  esac
  shift
done
need --name "$name"
need --zone "$zone"
case $action in create | babysit) need --type "$type" ;; esac
for option in lines grace poll max_failures; do need_number "--$option" "${!option}"; done
case $action in
  run | babysit) check_verb "${1:-}" ;;
  *) [ $# = 0 ] || die 64 "$action takes no verb, but there is '$1'" "see --help" ;;
esac
if [ "$action" = babysit ] && ! is_collective "$1"; then
  die 64 "$1 needs no babysitter" "tpu_vm.sh run … $1 …"
fi
[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
  die 64 "there is no gcloud here" "install the Google Cloud CLI, then: gcloud auth login"

# --- Actions -------------------------------------------------------------------------------------

case $action in
  create) create_slice ;;
  setup) set_up_slice ;;
  run)
    if is_collective "$1"; then
      start_run "$@"
      say "it runs without this connection; see: tpu_vm.sh logs --name=$name --zone=$zone --follow"
    else
      on_workers 0 "$(worker_command call "$@")"
    fi
    ;;
  logs) on_workers "$worker" "$(worker_command logs "$lines" ${follow:+follow})" ;;
  status)
    describe_slice
    on_workers all "$status_command"
    ;;
  stop) on_workers all "$(worker_command stop "$grace")" ;;
  delete) delete_slice ;;
  babysit) babysit "$@" ;;
esac
