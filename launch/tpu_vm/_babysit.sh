# shellcheck shell=bash
# shellcheck disable=SC2154 # tpu_vm.sh sets the options
# Sourced by tpu_vm.sh: keeps a run going until it is done.

# A run that lasted this long has put its earlier failures behind it.
healthy_seconds=600

babysit() { # VERB FLAGS...
  warn_of_lost_disks "$@"
  if [ -n "$dry_run" ]; then
    describe_slice
    create_slice
    on_workers all "$status_command"
    begin_run "$@"
    delete_slice
    return
  fi
  failures=0 shortages=0 unreachable=0 lagging=0 healthy=0 said='' ours=''
  while true; do
    local state
    state=$(slice_state)
    tell "$state" "the slice $name is $state"
    case $state in
      absent) make_slice ;;
      gone)
        say "the slice is gone (preempted, or it failed): making it again"
        delete_slice || back_off $? "deleting the slice"
        ;;
      waiting) sleep "$poll" ;;
      unknown) back_off 69 "asking for the state of the slice" ;;
      ready) tend_run "$@" ;;
    esac
  done
}

# Nothing that lies on the slice's own disks is there after a preemption.
warn_of_lost_disks() { # VERB FLAGS...
  local argument
  for argument in "$@"; do
    case $argument in --workdir=/*) return ;; esac
  done
  say "note: the run folder lies on the slice and goes with it: the next slice starts from scratch;"
  say "      with --bucket=BUCKET and --workdir=/mnt/runs/NAME it goes on"
}

# Says something once, when it changes.
tell() { # KEY TEXT
  if [ "$said" != "$1" ]; then say "$2"; fi
  said=$1
}

# Waits longer after each failure in a row; after too many it gives up.
back_off() { # CODE WHAT
  failures=$((failures + 1))
  if [ "$failures" -gt "$max_failures" ]; then
    die "$1" "$2 failed $failures times in a row, the last time with $1" \
      "tpu_vm.sh logs --name=$name --zone=$zone; the slice still exists and costs money"
  fi
  say "$2 failed with $1; again in $(backoff_seconds "$failures") s"
  sleep "$(backoff_seconds "$failures")"
}

make_slice() {
  local answer code=0
  answer=$(create_slice 2>&1) || code=$?
  say "$answer"
  if [ "$code" = 0 ]; then
    shortages=0
    return
  fi
  case $answer in
    *[Cc]apacity* | *RESOURCE_EXHAUSTED* | *[Ss]tockout* | *UNAVAILABLE*) # worth any patience
      shortages=$((shortages + 1))
      say "no slice to be had; again in $(backoff_seconds "$shortages") s"
      sleep "$(backoff_seconds "$shortages")"
      ;;
    *) back_off "$code" "making the slice" ;;
  esac
}

# One look at the run on a slice that is ready.
tend_run() { # VERB FLAGS...
  local report
  if ! report=$(on_workers all "$status_command" 2>/dev/null); then
    unreachable=$((unreachable + 1))
    say "a worker does not answer ($unreachable of 3)"
    if [ "$unreachable" -ge 3 ]; then # half dead, whatever its state says
      unreachable=0
      delete_slice || back_off $? "deleting the slice"
    else
      sleep "$poll"
    fi
    return
  fi
  unreachable=0
  set -- "$(run_state "$report")" "$@"
  case $1 in
    running | partly) ours=yes ;; # of a babysitter before this one
    *) [ -n "$ours" ] || set -- none "${@:2}" ;; # what ended earlier was another run
  esac
  tell "$1" "the run: $1"
  case $1 in
    none)
      shift
      begin_run "$@" || back_off $? "starting the run"
      ;;
    running)
      healthy=$((healthy + poll))
      if [ "$healthy" -ge "$healthy_seconds" ]; then failures=0; fi
      sleep "$poll"
      ;;
    partly)
      lagging=$((lagging + 1))
      if [ "$lagging" -lt 5 ]; then
        sleep "$poll"
      else
        shift
        start_again 137 "$@"
      fi
      ;;
    stopped) say "a person stopped the run: everything is saved"; exit 75 ;;
    *) start_again "${1#ended }" "${@:2}" ;;
  esac
}

# What the lines of all workers say together: none, running, partly (some have ended well, the
# others still run), stopped, or "ended CODE".
run_state() { # REPORT
  local host state code running='' none='' stopped='' codes=()
  while read -r _ host state code; do
    : "$host"
    case $state in
      running) running=yes ;;
      none) none=yes ;;
      stopped) stopped=yes codes+=("$code") ;;
      ended) codes+=("$code") ;;
    esac
  done < <(printf '%s\n' "$1" | grep '^hippocampus: ')
  code=0
  [ ${#codes[@]} = 0 ] || code=$(combined_code "${codes[@]}")
  if [ -n "$none" ]; then
    echo none # a worker that knows nothing of a run is set up anew, and all with it
  elif [ -z "$running" ]; then
    if [ -n "$stopped" ]; then
      echo stopped
    elif [ ${#codes[@]} = 0 ]; then
      echo none
    else
      echo "ended $code"
    fi
  elif [ ${#codes[@]} = 0 ]; then
    echo running
  else
    case $code in 0 | 75) echo partly ;; *) echo "ended $code" ;; esac
  fi
}

# The run has ended: what its exit code asks for.
start_again() { # CODE VERB FLAGS...
  local code=$1
  shift
  lagging=0 healthy=0
  case $(what_next "$code") in
    'done')
      say "the run is done; the slice still exists and costs money:"
      say "  launch/tpu_vm/tpu_vm.sh delete --name=$name --zone=$zone${queued:+ --queued}"
      exit 0
      ;;
    never)
      die "$code" "the run ended with $code, and would again" \
        "tpu_vm.sh logs --name=$name --zone=$zone; then delete the slice, which costs money"
      ;;
    again) sleep 10 ;;
    retry)
      if [ "$code" = "$lost_peer" ]; then say "the run lost a worker, and can go on"; fi
      back_off "$code" "the run"
      ;;
  esac
  restart_run "$@" || back_off $? "starting the run"
}

begin_run() { # VERB FLAGS...
  set_up_slice && restart_run "$@"
}

restart_run() { # VERB FLAGS...
  ours=yes
  on_workers all "$(worker_command clear)" && start_run "$@"
}
