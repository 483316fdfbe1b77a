# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # tpu_vm.sh sets the options and uses what is set here
# Sourced by tpu_vm.sh: the commands for a slice and its workers.

gcloud_tpu() { # GROUP WORDS...
  run gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

# --- The slice -----------------------------------------------------------------------------------

# The image that a type boots with.
image_of() { # TYPE
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create_slice() {
  local image=${version:-$(image_of "$type")}
  if [ -n "$queued" ]; then
    gcloud_tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$image" ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"}
  else
    gcloud_tpu tpu-vm create "$name" "--accelerator-type=$type" "--version=$image" \
      ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"}
  fi
}

delete_slice() {
  if [ -n "$queued" ]; then
    gcloud_tpu queued-resources delete "$name" --force --quiet # --force: its node too
  else
    gcloud_tpu tpu-vm delete "$name" --quiet
  fi
}

describe_slice() {
  if [ -n "$queued" ]; then
    gcloud_tpu queued-resources describe "$name" '--format=value(state.state)'
  fi
  gcloud_tpu tpu-vm describe "$name" '--format=value(state)'
}

# Prints absent, waiting, ready, gone or unknown (gcloud itself failed: nothing is known).
slice_state() {
  local answer
  if [ -n "$queued" ]; then
    answer=$(describe_quietly queued-resources 'value(state.state)')
    case $answer in
      ACTIVE) ;;
      FAILED | SUSPENDED) answer=gone ;;
      absent | unknown) ;;
      *) answer=waiting ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING …
    esac
    if [ "$answer" != ACTIVE ]; then
      echo "$answer"
      return
    fi
  fi
  answer=$(describe_quietly tpu-vm 'value(state)')
  case $answer in
    READY) echo ready ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING) echo waiting ;;
    STOPPING | STOPPED) echo waiting ;; # by a person: it and its disks stay
    absent) if [ -n "$queued" ]; then echo gone; else echo absent; fi ;;
    unknown) echo unknown ;;
    *) echo gone ;; # PREEMPTED, TERMINATED, HIDDEN …
  esac
}

describe_quietly() { # GROUP FORMAT
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$name" "--format=$2" "--zone=$zone" \
    ${project:+"--project=$project"} 2>&1); then
    printf '%s\n' "$answer" | tail -n 1 # warnings come first
    return
  fi
  # A second slice must not be made because a login has run out.
  case $answer in
    *NOT_FOUND* | *"not found"*) echo absent ;;
    *)
      say "$answer"
      echo unknown
      ;;
  esac
}

# --- Its workers ---------------------------------------------------------------------------------

on_workers() { # WORKERS COMMAND
  gcloud_tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2" --quiet ${internal:+--internal-ip}
}

worker_command() { # WORDS...
  local words=(bash hippocampus/launch/tpu_vm/_worker.sh "$@")
  if [ ${#variables[@]} != 0 ]; then words=(env "${variables[@]}" "${words[@]}"); fi
  shell_words "${words[@]}"
}

# shellcheck disable=SC2016 # the worker expands it
status_command='w=hippocampus/launch/tpu_vm/_worker.sh; if [ -f $w ]; then bash $w status; else echo "hippocampus: $(uname -n) none"; fi'

# The files of this checkout that git does not ignore, as they are now.
pack_checkout() { # ARCHIVE
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
      tar --null -czf "$1" -T -
  else
    tar -czf "$1" --exclude='./.venv*' --exclude=./checkpoints .
  fi
}

set_up_slice() {
  local archive=hippocampus.tar.gz folder='' code=0
  if [ -z "$dry_run" ]; then
    folder=$(mktemp -d "${TMPDIR:-/tmp}/hippocampus.XXXXXX")
    archive=$folder/hippocampus.tar.gz
    pack_checkout "$archive" || return 69
  fi
  gcloud_tpu tpu-vm scp "$archive" "$name:" --worker=all --quiet ${internal:+--internal-ip} &&
    on_workers all "$(setup_command)" || code=$?
  [ -z "$folder" ] || rm -rf "$folder"
  return "$code"
}

setup_command() {
  local fresh='mkdir -p hippocampus && rm -rf hippocampus/hippocampus hippocampus/configs'
  printf '%s && tar -xzf hippocampus.tar.gz -C hippocampus && %s' "$fresh" \
    "$(worker_command setup ${bucket:+"$bucket"})"
}

start_run() { # VERB FLAGS...
  local devices
  devices=$(devices_of "$type")
  if ! has_flag --expect_devices "$@"; then
    if [ -n "$devices" ]; then
      set -- "$@" "--expect_devices=$devices"
    else
      say "note: with --type=TYPE the run would check that no chip is missing"
    fi
  fi
  on_workers all "$(worker_command start "$@")"
}
