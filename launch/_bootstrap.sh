# shellcheck shell=sh
# Sourced by ./run, ./test and .ci/run from the root of the checkout: makes a Python environment
# that is ready to use, and leaves its interpreter in $python.
#
#   set_up          what ./run needs
#   set_up dev      the same, and the tools that ./test needs
#
# Environment:
#   HIPPOCAMPUS_PYTHON   interpreter to build the environment from (default: the first that fits)
#   HIPPOCAMPUS_VENV     where the environment lives (default: .venv)
#   HIPPOCAMPUS_ACCEL    cpu, cuda12, cuda13 or tpu (default: what the machine has)
#   HIPPOCAMPUS_NO_VENV  1: use the present interpreter and never touch its jax (Colab)
#   HIPPOCAMPUS_DEV      where device files are looked for (default: /dev; for the tests)
#
# Exit codes: 64 wrong settings or no usable Python, 69 the packages could not be installed.

root=$(pwd -P)
venv=${HIPPOCAMPUS_VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
lock=$venv.lock
log=$venv.setup.log

say() { printf '%s\n' "$*" >&2; }

# die CODE ERROR HINT
die() {
  say "error: $2"
  say "hint: $3"
  exit "$1"
}

# Words as one would type them into a shell, each after a space.
quoted() {
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./=:,@%+-]*)
        printf " '%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
}

# --- Python --------------------------------------------------------------------------------------

# Prints "3.11" for an interpreter that really runs (a pyenv shim on PATH may not). The status says
# whether it can also make virtual environments, which Debian packages separately.
probe_python() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); import venv, ensurepip' 2>/dev/null
}

new_enough() { # VERSION, such as 3.11
  case $1 in
    3.*) [ "${1#3.}" -ge 11 ] ;;
    *) false ;;
  esac
}

# Leaves the interpreter to build from in $base.
find_python() {
  too_old='' without_venv=''
  if [ -n "${HIPPOCAMPUS_PYTHON:-}" ]; then
    set -- "$HIPPOCAMPUS_PYTHON"
  else
    set -- python3 python3.13 python3.12 python3.11 \
      "${HOME:-}"/.pyenv/versions/3.1[1-3]*/bin/python "${HOME:-}"/.local/bin/python3.1[1-3]
  fi
  for base in "$@"; do
    venv_works=yes
    version=$(probe_python "$base") || venv_works=''
    if ! new_enough "$version"; then
      too_old=${too_old:-$version}
    elif [ -z "$venv_works" ] && [ "${HIPPOCAMPUS_NO_VENV:-}" != 1 ]; then
      without_venv=${without_venv:-$version}
    else
      return 0
    fi
  done
  if [ -n "$without_venv" ]; then
    die 64 "Python $without_venv is here, but it cannot make virtual environments" \
      "apt install python$without_venv-venv"
  fi
  found=${too_old:-none}${HIPPOCAMPUS_PYTHON:+ at $HIPPOCAMPUS_PYTHON}
  die 64 "Python 3.11 or newer is needed; found $found" \
    "apt install python3.11 python3.11-venv (or: uv python install 3.12), or set HIPPOCAMPUS_PYTHON"
}

# Prints the first interpreter newer than 3.11 that really runs.
newer_python() {
  for candidate in python3.13 python3.12 \
    "${HOME:-}"/.pyenv/versions/3.13*/bin/python "${HOME:-}"/.pyenv/versions/3.12*/bin/python; do
    if probe_python "$candidate" >/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# --- Accelerator ---------------------------------------------------------------------------------

# A vfio group can belong to any passed-through device; only a TPU host also has one of these.
on_tpu_host() {
  metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  env | grep -q '^TPU_' ||
    curl -sf -m 2 -H 'Metadata-Flavor: Google' -o /dev/null "$metadata/accelerator-type" 2>/dev/null
}

# Prints the extra of pyproject.toml that suits this machine, or cpu.
detect_accelerator() {
  if [ -n "${HIPPOCAMPUS_ACCEL:-}" ]; then
    echo "$HIPPOCAMPUS_ACCEL"
    return
  fi
  if [ -e "$devices/accel0" ] || { [ -e "$devices/vfio/0" ] && on_tpu_host; }; then
    echo tpu
    return
  fi
  query=driver_version,compute_cap
  gpu=$(nvidia-smi --query-gpu=$query --format=csv,noheader 2>/dev/null) || gpu=''
  driver=${gpu%%.*}
  # CUDA 13 has dropped the GPUs before Turing (7.5), whatever their driver.
  oldest_gpu=$(printf '%s\n' "$gpu" | sed -n 's/.*, *//p' | sort -n | head -n 1)
  case $driver in
    '' | *[!0-9]*) echo cpu ;;
    *)
      if [ "$driver" -ge 580 ]; then
        case $oldest_gpu in [56].* | 7.[0-4]) echo cuda12 ;; *) echo cuda13 ;; esac
      elif [ "$driver" -ge 525 ]; then
        echo cuda12
      else
        say "note: JAX needs NVIDIA driver 525 or newer; with $driver, this is set up for the CPU"
        echo cpu
      fi
      ;;
  esac
}

# What detect_accelerator goes by, without the second that nvidia-smi takes.
accelerator_evidence() {
  if [ -n "${HIPPOCAMPUS_ACCEL:-}" ]; then
    echo "$HIPPOCAMPUS_ACCEL"
    return
  fi
  if [ -e "$devices/accel0" ]; then printf 'accel0 '; fi
  if [ -e "$devices/vfio/0" ]; then
    printf 'vfio '
    if env | grep -q '^TPU_'; then printf 'TPU '; fi
  fi
  command -v nvidia-smi || true
  if [ -r /proc/driver/nvidia/version ]; then cksum </proc/driver/nvidia/version; fi
}

# --- Lock ----------------------------------------------------------------------------------------

# The lock is a symbolic link to "host:pid": it appears and names its owner in one atomic step.
# While an installer runs it is "host:pid:installer".
take_lock() {
  told='' me=$(uname -n):$$
  mkdir -p "${lock%/*}"
  until ln -s "$me" "$lock" 2>/dev/null; do
    owner=$(readlink "$lock") || owner=''
    if [ -z "$owner" ]; then # just released, or the folder refuses new files
      [ -w "${lock%/*}" ] ||
        die 64 "cannot write in ${lock%/*}" "set HIPPOCAMPUS_VENV to a folder that you own"
      pause
      continue
    fi
    if owner_is_gone && mkdir "$lock.takeover" 2>/dev/null; then
      # Looked at again inside the guard: another waiter may have replaced it in between.
      if [ "$(readlink "$lock")" = "$owner" ]; then rm -f "$lock"; fi
      rmdir "$lock.takeover"
      continue
    fi
    if [ -z "$told" ]; then
      say "waiting for another set-up to finish ($owner; its lock is $lock)"
      told=yes
    fi
    pause
  done
  trap drop_lock EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
}

pause() { sleep 0.2 2>/dev/null || sleep 1; } # POSIX knows whole seconds only

owner_is_gone() {
  [ "${owner%%:*}" = "${me%%:*}" ] || return 1 # cannot be seen from here
  for pid in $(printf '%s' "${owner#*:}" | tr : ' '); do
    if is_alive "$pid"; then return 1; fi
  done
}

# kill -0 refuses another user's process, and takes a zombie for alive, which an orphan stays for
# ever in a container that has no init. /proc, where there is one, knows better.
is_alive() { # PID
  if [ -r /proc/self/status ]; then
    [ -r "/proc/$1/status" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
  else
    kill -0 "$1" 2>/dev/null
  fi
}

# Runs a command that holds the lock beside this shell: when the shell alone is killed, an installer
# works on for a while, and a second one must not start meanwhile.
holding_lock() {
  # shellcheck disable=SC2016 # the inner shell expands these
  sh -c 'rm -f "$1.new"; ln -s "$0:$$" "$1.new" && mv -f "$1.new" "$1"; shift; exec "$@"' \
    "$me" "$lock" "$@"
}

drop_lock() {
  rm -f "$lock"
  trap - EXIT INT TERM HUP
}

# --- Environment ---------------------------------------------------------------------------------

# Everything that an environment depends on. It runs at every start, so it starts no Python.
setup_key() {
  cksum <pyproject.toml
  printf '%s\n' "$root" "${HIPPOCAMPUS_PYTHON:-}" "$evidence"
  readlink -f "$venv/bin/python" || true
}

is_ready() { # EXTRA
  [ -x "$venv/bin/python" ] && [ -f "$venv/.ready-${1:-run}" ] &&
    [ "$(setup_key)" = "$(cat "$venv/.ready-${1:-run}")" ]
}

# Written last and in one step, so that a set-up that was killed has none.
mark_ready() {
  setup_key >"$venv/.ready.new"
  mv "$venv/.ready.new" "$venv/.ready-$1"
}

# An environment can be kept when it runs and was made here, from this Python, for this accelerator.
# One without a note was made by hand, and is taken over.
can_keep_venv() {
  new_enough "$(probe_python "$venv/bin/python")" || return 1
  [ -n "$uv" ] || "$venv/bin/python" -c 'import pip' 2>/dev/null || return 1
  [ -f "$venv/.made-for" ] || return 0
  { read -r made_root && read -r made_python && read -r made_accel; } <"$venv/.made-for" || return 1
  [ "$made_root" = "$root" ] || return 1
  [ "${HIPPOCAMPUS_PYTHON:-$made_python}" = "$made_python" ] || return 1
  # The CUDA and TPU plugins of JAX do not live side by side.
  [ "$made_accel" = "$accel" ] || [ "$made_accel" = cpu ]
}

make_venv() {
  find_python
  if [ -f "$venv/pyvenv.cfg" ]; then rm -rf "$venv"; fi # never a folder that is not an environment
  mkdir -p "$venv"
  holding_lock "$base" -m venv "$venv" >>"$log" 2>&1 || install_failed "could not make ${venv#"$root/"}"
}

install_failed() {
  grep -i 'error' "$log" | tail -n 5 >&2 || true
  die 69 "$1" "the whole story is in $log; start again once the cause is mended"
}

# pip takes a package for installed once it sees its metadata, even when it was killed while copying
# the files. INSTALLER is written after them; metadata without it are thrown away.
forget_half_installed() {
  for metadata in "$venv"/lib/python*/site-packages/*.dist-info; do
    if [ -d "$metadata" ] && [ ! -f "$metadata/INSTALLER" ]; then rm -rf "$metadata"; fi
  done
}

# extras DEV ACCEL: "", "[dev]", "[cuda13]" or "[dev,cuda13]"
extras() {
  list=$1
  if [ "$2" != cpu ]; then list=${list:+$list,}$2; fi
  printf '%s' "${list:+[$list]}"
}

set_up_venv() { # EXTRA
  python=$venv/bin/python
  if is_ready "$1"; then return; fi
  take_lock
  if ! is_ready "$1"; then # the one we waited for may have done it
    if [ -f "$venv/.made-for" ]; then
      say "Updating ${venv#"$root/"} …"
    else
      say "Setting up ${venv#"$root/"} (first time only; about a minute) …"
    fi
    : >"$log"
    uv=$(command -v uv) || uv=''
    accel=$(detect_accelerator)
    can_keep_venv || make_venv
    rm -f "$venv"/.ready-*
    printf '%s\n' "$root" "${HIPPOCAMPUS_PYTHON:-}" "$accel" >"$venv/.made-for"
    forget_half_installed
    if [ -n "$uv" ]; then
      set -- "$1" uv pip install --python "$python"
    else
      set -- "$1" "$python" -m pip install --disable-pip-version-check
    fi
    wanted=$1
    shift
    holding_lock "$@" --quiet --editable ".$(extras "$wanted" "$accel")" >>"$log" 2>&1 ||
      install_failed "the packages could not be installed"
    if [ -n "$wanted" ]; then mark_ready "$wanted"; fi
    mark_ready run
  fi
  drop_lock
}

# Prints the interpreter of a second environment, .venv.tpu, whose jax has the compiler for TPUs
# (libtpu, 700 MB). It compiles for them on any machine; a newer Python gets a newer compiler.
tpu_environment() {
  # A shell of its own: everything here is named after the environment that is being made.
  newer=$(newer_python) || newer=''
  HIPPOCAMPUS_PYTHON=$newer HIPPOCAMPUS_ACCEL=tpu HIPPOCAMPUS_VENV=.venv.tpu HIPPOCAMPUS_NO_VENV='' \
    sh -euc '. launch/_bootstrap.sh; set_up; echo "$python"'
}

# --- The present interpreter ---------------------------------------------------------------------

# present_interpreter CONSTRAINTS EXTRA: 0 nothing is missing; 10 something is, and CONSTRAINTS now
# holds the installed jax; 11 the same, without any jax; 64 its jax does not fit.
present_interpreter() {
  "$python" - "$@" <<'PYTHON'
import json
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + project["optional-dependencies"].get(sys.argv[2], [])


def fits(requirement):
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def is_this_checkout():
    try:
        origin = distribution("hippocampus").read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return json.loads(origin or "{}").get("url") == Path.cwd().as_uri()


names = {d.metadata["Name"] for d in distributions()}
jax = next(r for r in map(Requirement, wanted) if r.name == "jax")
if "jax" in names and not fits(jax):
    print(f"error: this interpreter has jax {version('jax')}; needed is {jax}", file=sys.stderr)
    print("hint: change its jax by hand, or unset HIPPOCAMPUS_NO_VENV", file=sys.stderr)
    sys.exit(64)
pinned = sorted(n for n in names if n and re.fullmatch(r"jax|jaxlib|libtpu|jax[-_]cuda.*", n))
Path(sys.argv[1]).write_text("".join(f"{n}=={version(n)}\n" for n in pinned))
if all(map(fits, map(Requirement, wanted))) and is_this_checkout():
    sys.exit(0)
sys.exit(10 if "jax" in names else 11)
PYTHON
}

set_up_present_interpreter() { # EXTRA
  find_python
  python=$base constraints=$venv.constraints.txt
  missing=0
  present_interpreter "$constraints" "$1" || missing=$?
  case $missing in
    0) return ;;
    10) accel=cpu ;; # its own jax knows its accelerator
    11) accel=$(detect_accelerator) ;;
    64) exit 64 ;;
    *)
      die 69 "the installed packages of $python could not be listed" \
        "see that its pip works: $python -m pip list"
      ;;
  esac
  take_lock
  say "Installing what is missing beside the present jax …"
  holding_lock "$python" -m pip install --disable-pip-version-check --quiet \
    --constraint "$constraints" --editable ".$(extras "$1" "$accel")" >"$log" 2>&1 ||
    install_failed "the packages could not be installed"
  drop_lock
}

set_up() { # [dev]
  devices=${HIPPOCAMPUS_DEV:-/dev}
  case ${HIPPOCAMPUS_ACCEL:-} in
    '' | cpu | cuda12 | cuda13 | tpu) ;;
    *)
      die 64 "HIPPOCAMPUS_ACCEL=$HIPPOCAMPUS_ACCEL is not known" \
        "use cpu, cuda12, cuda13 or tpu, or leave it out"
      ;;
  esac
  evidence=$(accelerator_evidence)
  if [ "${HIPPOCAMPUS_NO_VENV:-}" = 1 ]; then
    set_up_present_interpreter "${1:-}"
  else
    set_up_venv "${1:-}"
  fi
}
