#!/usr/bin/env bash
# What launch/tpu_vm/tpu_vm.sh does on each worker of a slice; the run outlives the connection.
#
#   _worker.sh setup [BUCKET]      Python 3.11 or newer, the packages with '.[tpu]', the bucket
#   _worker.sh start VERB FLAGS    starts a run and returns
#   _worker.sh call VERB FLAGS     runs a verb to its end, on the terminal
#   _worker.sh status              prints: hippocampus: HOST none|running|ended CODE|stopped CODE
#   _worker.sh logs LINES [follow]
#   _worker.sh stop SECONDS        asks the run to save and end, and says so in its status
#   _worker.sh clear               ends what is left of a run, to make room for the next
#
# Files, in ~/hippocampus-run: log, pid, exit_code, stopped, python, bucket.
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd -- "$here/../.."
state=$HOME/hippocampus-run
runs=${HIPPOCAMPUS_RUNS:-/mnt/runs} # where a bucket is mounted
PATH=$HOME/.local/bin:$PATH # where pip puts uv
. launch/_common.sh
export HIPPOCAMPUS_ACCEL=${HIPPOCAMPUS_ACCEL:-tpu}
mkdir -p "$state"

# --- Set-up --------------------------------------------------------------------------------------

# The base images ship Python 3.10, on which a plain pip installs an old jax and says nothing.
bring_python() {
  local candidate version
  for candidate in "${HIPPOCAMPUS_PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && version=$(probe_python "$candidate") && new_enough "$version"; then
      HIPPOCAMPUS_PYTHON=$(command -v "$candidate")
      return
    fi
  done
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
    die 69 "Python 3.11 is missing, and uv, which would bring it, could not be installed" \
      "on each worker: python3 -m pip install --user uv (or install python3.11 and python3.11-venv)"
  uv python install --quiet 3.12 ||
    die 69 "uv could not bring Python 3.12" "see that the workers reach the internet"
  HIPPOCAMPUS_PYTHON=$(uv python find 3.12)
}

remember_python() {
  bring_python
  printf '%s\n' "$HIPPOCAMPUS_PYTHON" >"$state/python"
}

# Leaves the interpreter of the set-up environment in $python.
use_environment() {
  if [ -z "${HIPPOCAMPUS_READY_PYTHON:-}" ]; then
    [ -f "$state/python" ] || die 69 "this worker is not set up" "tpu_vm.sh setup, then again"
    HIPPOCAMPUS_PYTHON=$(cat "$state/python")
    export HIPPOCAMPUS_PYTHON
  fi
  ready_python
}

setup() { # [BUCKET]
  rm -f "$state/bucket"
  if [ -n "${1:-}" ]; then printf '%s\n' "${1#gs://}" >"$state/bucket"; fi
  mount_bucket
  if [ -z "${HIPPOCAMPUS_READY_PYTHON:-}" ]; then remember_python; fi
  use_environment
  # pip gives a CPU-only jax where a wheel of libtpu does not fit, and says nothing.
  "$python" -c 'from importlib.metadata import version as v; print("jax", v("jax"), "libtpu", v("libtpu"))' ||
    die 69 "the environment has no libtpu" "see .venv.setup.log on the worker"
}

# A run folder needs a file system, and one that the next slice still has. Mounted again at every
# start: a machine that was restarted has lost the mount.
mount_bucket() {
  if [ ! -f "$state/bucket" ] || grep -q " $runs " /proc/mounts; then return; fi
  command -v gcsfuse >/dev/null || install_gcsfuse >"$state/gcsfuse.log" 2>&1 ||
    die 69 "gcsfuse, which mounts the bucket, could not be installed" "see $state/gcsfuse.log"
  sudo mkdir -p "$runs"
  sudo chown "$(id -u)" "$runs"
  # No cached metadata: a worker must see at once what the others have written of a checkpoint.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
    "$(cat "$state/bucket")" "$runs" >>"$state/gcsfuse.log" 2>&1 ||
    die 69 "the bucket $(cat "$state/bucket") could not be mounted" "see $state/gcsfuse.log"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl -fsS "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  # A fresh image updates itself first, and holds the lock of apt meanwhile.
  sudo apt-get -o DPkg::Lock::Timeout=300 update
  sudo apt-get -o DPkg::Lock::Timeout=300 install --yes gcsfuse
}

# --- The run -------------------------------------------------------------------------------------

is_running() {
  local pid
  pid=$(cat "$state/pid" 2>/dev/null) || return 1
  # After a reboot the number may belong to something else.
  kill -0 "$pid" 2>/dev/null &&
    { [ ! -r "/proc/$pid/cmdline" ] || grep -q hippocampus "/proc/$pid/cmdline"; }
}

start() { # VERB FLAGS...
  if is_running; then die 64 "a run is going on here" "tpu_vm.sh stop, or wait for it"; fi
  use_environment
  mount_bucket
  rm -f "$state/pid" "$state/exit_code" "$state/stopped"
  local detach=(nohup)
  if command -v setsid >/dev/null; then detach+=(setsid); fi
  "${detach[@]}" bash "$here/_worker.sh" _watch "$python" "$@" </dev/null >>"$state/log" 2>&1 &
  local waited
  for ((waited = 0; waited < 50; waited++)); do
    if [ -f "$state/pid" ]; then
      echo "hippocampus: $(uname -n) started"
      return
    fi
    pause
  done
  die 69 "the run did not start" "see $state/log"
}

watch() { # PYTHON VERB FLAGS...
  local python=$1 verb=$2 code=0
  shift 2
  # At the end of a machine everything is told to stop; this shell still has a code to note.
  trap : TERM HUP INT
  unset_proxies
  export PYTHONUNBUFFERED=1
  # A bucket that answers slowly shall not hold a checkpoint for ever.
  export TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024
  echo "=== $(date -u '+%Y-%m-%d %H:%M:%S') UTC: $(shell_words "$verb" "$@")"
  # shellcheck disable=SC2016 # the inner shell expands these
  bash -c 'echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"' "$state/pid" \
    "$python" -m "hippocampus.$verb" "$@" || code=$?
  echo "=== $(date -u '+%Y-%m-%d %H:%M:%S') UTC: ended with $code"
  echo "$code" >"$state/exit_code.new"
  mv "$state/exit_code.new" "$state/exit_code"
}

status() {
  local what=none
  if [ -f "$state/exit_code" ]; then
    what="ended $(cat "$state/exit_code")"
    if [ -f "$state/stopped" ]; then what="stopped $(cat "$state/exit_code")"; fi
  elif is_running; then
    what=running
  elif [ -f "$state/pid" ]; then
    what='ended 137' # gone without a note: killed, or the machine was restarted
  fi
  echo "hippocampus: $(uname -n) $what"
}

# Returns when the run is gone.
end_run() { # SIGNAL SECONDS
  local left=$(($2 * 5))
  if is_running; then kill -s "$1" "$(cat "$state/pid")" 2>/dev/null || true; fi
  while [ "$left" -gt 0 ] && is_running; do
    pause
    left=$((left - 1))
  done
  if is_running; then kill -s KILL "$(cat "$state/pid")" 2>/dev/null || true; fi
}

action=${1:-}
[ $# = 0 ] || shift
case $action in
  setup) setup "${1:-}" ;;
  start) start "$@" ;;
  call)
    use_environment
    mount_bucket
    verb=$1
    shift
    exec "$python" -m "hippocampus.$verb" "$@"
    ;;
  _watch) watch "$@" ;;
  status) status ;;
  logs) exec tail -n "$1" ${2:+-F} "$state/log" ;;
  stop)
    if is_running; then : >"$state/stopped"; fi
    end_run TERM "$1"
    status
    ;;
  clear)
    end_run TERM 20
    rm -f "$state/pid" "$state/exit_code" "$state/stopped"
    ;;
  *) die 64 "unknown action '$action'" "see the top of $here/_worker.sh" ;;
esac
