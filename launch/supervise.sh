#!/usr/bin/env bash
# Keeps a training going on this machine: runs `jpeglm train`, and again after a preemption or a crash.
#
#   launch/setup.sh tpu && launch/supervise.sh configs/jpeglm_1b.py --data.path pictures/ --run runs/1b
#   launch/supervise.sh runs/1b
#
# The arguments are those of `jpeglm train`. Before each new start there is a pause, which doubles until a new checkpoint was
# saved. After JPEGLM_FAILURES ends in a row without a new checkpoint it gives up. SIGTERM and Ctrl-C are passed on to the
# training, which saves and exits; then this ends too.
#
#   --dry-run        print the command, run nothing
#   JPEGLM_FAILURES  ends in a row without a new checkpoint after which it gives up   [5]
#   JPEGLM_PAUSE     seconds before the first new start; at most 600 later            [10]
#
# The exit status is that of the last `jpeglm train`: 0 done, 75 stopped and saved (run it again), anything else an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The exit status of a training that was told to stop (SIGTERM), saved, and should be run again: EX_TEMPFAIL of sysexits.h.
readonly PREEMPTED=75

# By default pauses of 10, 20, 40 and 80 s. In all that is longer than the 100 s after which, in a run on many hosts, the others
# notice that one has died: they end too, are started again by their own supervisors, and all meet again.
failures_allowed=${JPEGLM_FAILURES:-5}
first_pause=${JPEGLM_PAUSE:-10}

main() {
  case "${1:-}" in
    -h | --help) show_help; exit ;;
    --dry-run) dry_run=1; shift ;;
  esac
  find_run "$@"
  check_count JPEGLM_FAILURES "$failures_allowed"
  check_count JPEGLM_PAUSE "$first_pause"
  export PATH="$checkout/.venv/bin:$PATH"
  needs jpeglm "launch/setup.sh installs it"
  if [ -n "$dry_run" ]; then
    perform jpeglm train "$@"
  else
    keep_training "$@"
  fi
}

keep_training() {
  local failures=0 pause=$first_pause newest step status
  newest=$(newest_step) || newest=0
  trap stop TERM INT
  while true; do
    start_and_wait jpeglm train "$@"
    if [ "$status" = 0 ] || [ -n "$stopped" ]; then
      exit "$status"
    fi
    step=$(newest_step) || step=$newest  # a bucket that does not answer shows no progress
    if [ "$step" -gt "$newest" ]; then
      newest=$step failures=0 pause=$first_pause
    fi
    failures=$((failures + 1))
    local what="the training ended with exit status $status"
    [ "$status" != "$PREEMPTED" ] || what="the training was preempted and saved"
    if [ "$failures" -ge "$failures_allowed" ]; then
      say "$what; it ended $failures times without a checkpoint newer than step $newest: giving up"
      exit "$status"
    fi
    say "$what, saved up to step $newest; starting again in $pause s"
    start_and_wait sleep "$pause"
    [ -z "$stopped" ] || exit "$PREEMPTED"
    pause=$((pause * 2 < 600 ? pause * 2 : 600))
  done
}

child=""
stopped=""

# A command's exit status, in `status`. It runs in the background, as bash runs a trap only between commands, but during `wait`.
start_and_wait() {
  "$@" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child"  # the signal came before `child` was known
  while true; do
    interrupted=""
    status=0
    wait "$child" || status=$?
    [ -n "$interrupted" ] || break  # else `wait` came back for the signal, and the child still runs
  done
  child=""
}

stop() {
  interrupted=1 stopped=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}

# Step of the newest checkpoint, 0 if there is none; gs:// too.
newest_step() {
  python - "$run" <<'PYTHON'
import sys
from etils import epath

checkpoints = epath.Path(sys.argv[1]) / "checkpoints"
names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
print(max((int(name) for name in names if name.isdecimal()), default=0))
PYTHON
}

main "$@"
