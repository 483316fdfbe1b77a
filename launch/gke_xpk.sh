#!/usr/bin/env bash
# Runs a verb on a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk), on TPU slices
# or GPU nodes.
#
#   launch/gke_xpk.sh build  --image=IMAGE --accel=tpu
#   launch/gke_xpk.sh run    --cluster=C --name=NAME --image=IMAGE --tpu=v5litepod-16 [OPTIONS] \
#       VERB [FLAGS OF THE VERB]
#   launch/gke_xpk.sh run    --cluster=C --name=NAME --image=IMAGE --gpu=h100-80gb-8 --nodes=2 \
#       train --config=configs/quickstart.py --workdir=/mnt/runs/demo
#   launch/gke_xpk.sh list   --cluster=C
#   launch/gke_xpk.sh delete --cluster=C --name=NAME
#
# Actions:
#   build    makes the image of launch/Dockerfile from this checkout and pushes it
#   run      starts a workload; its log: kubectl logs -f jobs/NAME-slice-job-0
#   list     the workloads of the cluster
#   delete   ends a workload
#
# Options:
#   --cluster=C [--project=P] [--zone=Z]
#   --image=IMAGE            such as us-docker.pkg.dev/PROJECT/REPOSITORY/hippocampus:TAG
#   --accel=tpu|cuda12|cuda13   what the image is for (default: tpu)
#   --tpu=TYPE [--slices=N]  slices of TPUs (default: 1)
#   --gpu=TYPE [--nodes=N]   nodes of GPUs (default: 1)
#   --priority=P             very-low, low, medium (default), high, very-high
#   --max_restarts=N         how often the workload is started again (default: 20)
#   --xpk_flag=FLAG          another flag for xpk workload create (repeatable)
#   --env=NAME=VALUE         a variable for the run (repeatable)
#   --dry-run                print the commands, run none
#
# Exit codes of the run: 1, 69, 75 and 127 to 255 start the workload again, up to --max_restarts, 64
# and 66 end it. 134 (a peer was lost) becomes 75, after a wait, while the run gets on.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/_common.sh

action=${1:-}
case $action in
  --help | -h) usage launch/gke_xpk.sh; exit 0 ;;
  build | run | list | delete) shift ;;
  *) die 64 "there is no action '$action'" "one of build, run, list, delete; see --help" ;;
esac
cluster='' project='' zone='' name='' image='' accel=tpu tpu='' slices=1 gpu='' nodes=1
priority=medium max_restarts=20 flags=() variables=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage launch/gke_xpk.sh; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --cluster=*) cluster=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accel=*) accel=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --gpu=*) gpu=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --priority=*) priority=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --xpk_flag=*) flags+=("${1#*=}") ;;
    --env=*=*) variables+=("--env=${1#*=}") ;;
    -*) unknown_option "$1" ;;
    *) break ;;
  esac
  shift
done
if [ "$action" = run ]; then
  check_verb "${1:-}"
elif [ $# != 0 ]; then
  die 64 "$action takes no verb, but there is '$1'" "see --help"
fi
case $accel in
  tpu | cuda12 | cuda13) ;;
  *) die 64 "--accel is '$accel'" "one of tpu, cuda12, cuda13" ;;
esac

need_tool() { # NAME HOW-TO-GET-IT
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || die 64 "there is no $1 here" "$2"
}

xpk_workload() { # ACTION WORDS...
  need --cluster "$cluster"
  need_tool xpk "pip install xpk"
  run xpk workload "$@" "--cluster=$cluster" ${project:+"--project=$project"} ${zone:+"--zone=$zone"}
}

# xpk writes the command into YAML: where a quote, a backslash or a dollar would not survive that,
# the words travel in base64.
node_command() { # VERB FLAGS...
  local words
  words=$(quoted "$@")
  case $words in
    *[!A-Za-z0-9_./=:,@%+\'\ -]*) words=" --encoded=$(shell_words "$@" | base64 | tr -d '\n')" ;;
  esac
  printf 'exec bash launch/_node.sh%s' "$words"
}

start_workload() { # VERB FLAGS...
  need --name "$name"
  need --image "$image"
  need_number --slices "$slices"
  need_number --nodes "$nodes"
  need_number --max_restarts "$max_restarts"
  local devices=() chips
  case ${tpu:+tpu}${gpu:+gpu} in
    tpu)
      devices=("--tpu-type=$tpu" "--num-slices=$slices")
      chips=$(devices_of "$tpu")
      [ -z "$chips" ] || variables+=("--env=HIPPOCAMPUS_EXPECT_DEVICES=$((slices * chips))")
      ;;
    gpu) devices=("--device-type=$gpu" "--num-nodes=$nodes") ;;
    *) die 64 "give one of --tpu=TYPE and --gpu=TYPE" "such as --tpu=v5litepod-16" ;;
  esac
  xpk_workload create "--workload=$name" "${devices[@]}" "--docker-image=$image" \
    "--priority=$priority" "--max-restarts=$max_restarts" --restart-on-exit-codes=1,69,75 \
    --termination-grace-period-seconds=120 ${variables[@]+"${variables[@]}"} \
    ${flags[@]+"${flags[@]}"} "--command=$(node_command "$@")"
}

case $action in
  build)
    need --image "$image"
    need_tool docker "see https://docs.docker.com/engine/install"
    run docker build "--build-arg=ACCEL=$accel" --file=launch/Dockerfile "--tag=$image" .
    run docker push "$image"
    ;;
  run) start_workload "$@" ;;
  list) xpk_workload list ;;
  delete)
    need --name "$name" # without one, xpk deletes all workloads of the cluster
    xpk_workload delete "--workload=$name" --force
    ;;
esac
