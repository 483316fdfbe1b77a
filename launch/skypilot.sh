#!/usr/bin/env bash
# Runs a verb as a managed job of SkyPilot, which finds the machines, on spot prices if asked, and
# starts the job again elsewhere when they are taken back. The job is launch/skypilot.yaml.
#
#   launch/skypilot.sh [OPTIONS] VERB [FLAGS OF THE VERB]
#   launch/skypilot.sh --gpus=H100:8 --nodes=2 --spot --bucket=gs://mine \
#       train --config=configs/quickstart.py --workdir=/runs/demo
#   launch/skypilot.sh --gpus=tpu-v5litepod-8 --accel=tpu --spot --bucket=gs://mine \
#       train --config=configs/quickstart.py --workdir=/runs/demo
#
# Options:
#   --name=NAME        of the job (default: hippocampus)
#   --gpus=TYPE[:N]    GPUs, or a TPU type, of each node (default: as in the file, H100:8)
#   --accel=ACCEL      cuda12 (default), cuda13 or tpu: what is installed
#   --nodes=N          nodes (default: 1)
#   --spot             cheaper, and may be taken back at any time
#   --bucket=URL       mounted at /runs (gs://, s3:// …); without one a new machine starts from scratch
#   --env=NAME=VALUE   a variable for the run (repeatable)
#   --sky_flag=FLAG    another flag for sky jobs launch (repeatable)
#   --dry-run          print the commands, run none
#
# Its log: sky jobs logs --name NAME. Exit codes of the run: 69 and 75 start it again, others end
# it. 134 (a peer was lost) becomes 75, after a wait, while the run in --bucket gets on.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
. launch/_common.sh

name=hippocampus gpus='' accel=cuda12 nodes=1 spot='' bucket='' flags=() variables=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage launch/skypilot.sh; exit 0 ;;
    --dry-run) dry_run=yes ;;
    --name=*) name=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --accel=*) accel=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --spot) spot=yes ;;
    --bucket=*) bucket=${1#*=} ;;
    --env=*=*) variables+=("--env=${1#*=}") ;;
    --sky_flag=*) flags+=("${1#*=}") ;;
    -*) unknown_option "$1" ;;
    *) break ;;
  esac
  shift
done
check_verb "${1:-}"
need_number --nodes "$nodes"
case $accel in
  tpu | cuda12 | cuda13) ;;
  *) die 64 "--accel is '$accel'" "one of tpu, cuda12, cuda13" ;;
esac
case $gpus:$accel in
  tpu-*:tpu)
    type=${gpus#tpu-}
    chips=$(devices_of "${type%%:*}")
    [ -z "$chips" ] || variables+=("--env=HIPPOCAMPUS_EXPECT_DEVICES=$((nodes * chips))")
    ;;
  tpu-*) die 64 "--gpus=$gpus needs --accel=tpu" "give both" ;;
  *:tpu) die 64 "--accel=tpu needs a TPU type" "such as --gpus=tpu-v5litepod-8" ;;
esac
[ -n "$dry_run" ] || command -v sky >/dev/null ||
  die 64 "there is no sky here" "pip install 'skypilot[gcp]' (or another cloud)"

job=launch/skypilot.yaml
if [ -n "$bucket" ]; then
  # The place of a mount cannot be a variable: a copy of the job gets it.
  if [ -z "$dry_run" ]; then
    folder=$(mktemp -d "${TMPDIR:-/tmp}/hippocampus.XXXXXX")
    trap 'rm -rf "$folder"' EXIT
    job=$folder/skypilot.yaml
    cat launch/skypilot.yaml >"$job"
    # What is cached on one node is not seen by the others for a while.
    if [ "$nodes" = 1 ]; then mode=MOUNT_CACHED; else mode=MOUNT; fi
    printf '\nfile_mounts:\n  /runs:\n    source: "%s"\n    mode: %s\n' "$bucket" "$mode" >>"$job"
  fi
elif [ "$1" = train ]; then
  say "note: without --bucket a machine that is taken back takes the run folder with it"
fi
run sky jobs launch --yes "--name=$name" ${gpus:+"--gpus=$gpus"} "--num-nodes=$nodes" \
  ${spot:+--use-spot} "--env=HIPPOCAMPUS_ACCEL=$accel" "--env=HIPPOCAMPUS_ARGUMENTS=$(shell_words "$@")" \
  ${variables[@]+"${variables[@]}"} ${flags[@]+"${flags[@]}"} "$job"
