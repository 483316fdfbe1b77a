# shellcheck shell=bash
# Sourced by the launchers from the root of the checkout: verbs, quoting, --dry-run, exit codes.
#
# Environment, besides that of launch/_bootstrap.sh:
#   HIPPOCAMPUS_READY_PYTHON   an interpreter that has everything: nothing is set up (containers,
#                              conda, environment modules)

# shellcheck source=launch/_bootstrap.sh
. launch/_bootstrap.sh

dry_run=''

# The comment at the top of a launcher is its manual.
usage() { # FILE
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"
}

# The words, quoted so that a shell reads them back unchanged.
shell_words() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Shows a command and runs it; with --dry-run, only prints it.
run() {
  if [ -n "$dry_run" ]; then
    shell_words "$@"
    echo
  else
    say "\$ $(shell_words "$@")"
    "$@"
  fi
}

# --- Arguments -----------------------------------------------------------------------------------

unknown_option() { # OPTION
  case $1 in
    *=*) die 64 "unknown option ${1%%=*}" "the options of $(basename "$0") come before the verb; see --help" ;;
    *) die 64 "unknown option $1, or one without its value" "write $1=VALUE; see --help" ;;
  esac
}

need() { # NAME VALUE
  [ -n "$2" ] || die 64 "$1 is missing" "give $1=VALUE; see --help"
}

need_number() { # NAME VALUE
  case $2 in
    '' | *[!0-9]* | 0*) die 64 "$1 is '$2'" "it must be a whole number, at least 1" ;;
  esac
}

check_verb() { # VERB
  case ${1:-} in
    train | evaluate | probe | sample) ;;
    '') die 64 "no verb is given" "one of train, evaluate, probe, sample, then its own flags" ;;
    *) die 64 "there is no verb '$1'" "one of train, evaluate, probe, sample, then its own flags" ;;
  esac
  [ -f "hippocampus/$1.py" ] ||
    die 64 "this version of Hippocampus has no verb $1" "there is no hippocampus/$1.py here"
}

# Whether the processes of a verb work together, over all devices; the others are one process.
is_collective() { # VERB
  case $1 in
    train | evaluate) ;;
    *) false ;;
  esac
}

has_flag() { # --NAME ARGUMENT...
  local wanted=$1 argument
  shift
  for argument in "$@"; do
    case $argument in "$wanted" | "$wanted"=*) return 0 ;; esac
  done
  return 1
}

# How many devices JAX sees on a whole TPU slice; nothing for a type that is not known here.
devices_of() { # TYPE
  local size=${1#*-}
  case $size in '' | *[!0-9]*) return ;; esac
  case $1 in
    v2-* | v3-* | v5litepod-* | v6e-*) echo "$size" ;;
    v4-* | v5p-*) echo $((size / 2)) ;; # named by cores, two of which are one device
  esac
}

# --- Exit codes ----------------------------------------------------------------------------------

# What an exit code asks for: done, never (the same command would fail again), again (it was stopped
# with everything saved) or retry (after a while, and not for ever).
what_next() { # CODE
  case $1 in
    0) echo 'done' ;;
    64 | 66) echo never ;;
    75) echo again ;;
    *) echo retry ;;
  esac
}

# A process that lost its peers is ended by JAX with SIGABRT: what was saved is there, and the code
# says nothing of why the peer went.
lost_peer=134

# The one exit code of several processes: the code that says why goes first. That is 64, 66, then the
# first failure, then 134, then 75.
combined_code() { # CODE...
  local code worst=0
  for code in "$@"; do
    case $code in
      64) worst=64 ;;
      66) [ "$worst" = 64 ] || worst=66 ;;
      75) [ "$worst" != 0 ] || worst=75 ;;
      "$lost_peer") case $worst in 0 | 75) worst=$code ;; esac ;;
      0) ;;
      *) case $worst in 0 | 75 | "$lost_peer") worst=$code ;; esac ;;
    esac
  done
  echo "$worst"
}

# 10 s after the first failure, then twice as long each time, at most 10 minutes.
backoff_seconds() { # FAILURES
  local seconds=10 failure
  for ((failure = 1; failure < $1 && seconds < 600; failure++)); do seconds=$((seconds * 2)); done
  echo $((seconds < 600 ? seconds : 600))
}

# --- Where it runs -------------------------------------------------------------------------------

# Leaves an interpreter that has everything in $python.
ready_python() {
  if [ -z "${HIPPOCAMPUS_READY_PYTHON:-}" ]; then
    set_up ''
    return
  fi
  python=$HIPPOCAMPUS_READY_PYTHON
  command -v "$python" >/dev/null ||
    die 64 "HIPPOCAMPUS_READY_PYTHON=$python cannot be run" "give an interpreter, or unset it"
}

# JAX's coordinator speaks gRPC, which a proxy swallows: initialisation then hangs.
unset_proxies() {
  local name
  for name in $(compgen -e); do
    case $name in
      [Nn][Oo]_[Pp][Rr][Oo][Xx][Yy]) ;;
      *_[Pp][Rr][Oo][Xx][Yy]) unset "$name" ;;
    esac
  done
}

# A scheduler's variables would take part in JAX's own search for its peers.
unset_schedulers() {
  local name
  for name in $(compgen -e); do
    case $name in
      SLURM_* | OMPI_* | PMI_* | PMIX_* | JAX_COORDINATOR_* | JAX_LOCAL_DEVICE_IDS) unset "$name" ;;
    esac
  done
}
