#!/usr/bin/env bash
# What tpu_vm.sh runs on each worker, in the checkout that it has copied there. By hand, logged in to a worker, the same:
#
#   launch/worker.sh install      Python, .venv and the package
#   launch/worker.sh start ...    supervise.sh with these arguments of `jpeglm train`, detached, its output in ~/.jpeglm/log
#   launch/worker.sh stop         SIGTERM to it; returns when it has saved and ended
#   launch/worker.sh status       one line: worker HOST: absent | idle | running RUN | stopped RUN | done RUN | failed RUN (...)
#   launch/worker.sh log          the last lines of the log, and what comes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$checkout"

state="$HOME/.jpeglm"
mkdir -p "$state"

main() {
  local command=${1:-}
  [ $# = 0 ] || shift
  case "$command" in
    install | start | stop | status | log | job) "$command" "$@" ;;
    -h | --help) show_help ;;
    *) fail "unknown command '$command'; there are install, start, stop, status, log" ;;
  esac
}

install() {
  # The images of TPU VMs may have a Python that is too old for us, or one that cannot make a .venv.
  if [ ! -x .venv/bin/python ]; then
    [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh  # docs.astral.sh/uv/getting-started/installation
    ~/.local/bin/uv python install --quiet 3.12
    PYTHON=$(~/.local/bin/uv python find --managed-python 3.12)
  else
    PYTHON=.venv/bin/python
  fi
  export PYTHON
  source launch/setup.sh tpu,gcs
}

start() {
  find_run "$@"
  if running; then
    [ "$(cat "$state/run")" = "$run" ] || fail "$(cat "$state/run") is running on $(hostname): \`stop\` ends it"
    status
    return
  fi
  echo "$run" >"$state/run"
  rm -f "$state/status" "$state/pid"
  # Out of the session of the ssh that this comes from. The lock is held for as long as any process of the job lives, and by
  # none after a reboot; the id of a process would say neither. It is waited for, as `running` too takes it for a moment.
  setsid flock --timeout 5 "$state/lock" "$checkout/launch/worker.sh" job "$@" </dev/null >>"$state/log" 2>&1 &
  until [ -s "$state/pid" ]; do sleep 0.1; done
  status
}

# The job itself: leaves its exit status behind.
job() {
  say "supervise.sh $(quoted "$@")"
  launch/supervise.sh "$@" &
  echo $! >"$state/pid"
  local status=0
  wait $! || status=$?
  echo "$status" >"$state/status"
}

stop() {
  if running; then
    kill -TERM "$(cat "$state/pid")" || true
    while running; do sleep 0.2; done
  fi
  status
}

status() {
  local what=idle
  if running; then
    what="running $(cat "$state/run")"
  elif ! compgen -G ".venv/installed-*" >/dev/null; then
    what=absent
  elif [ -e "$state/status" ]; then
    case "$(cat "$state/status")" in
      0) what="done $(cat "$state/run")" ;;
      75 | 143) what="stopped $(cat "$state/run")" ;;
      *) what="failed $(cat "$state/run") (exit status $(cat "$state/status"), see the log)" ;;
    esac
  fi
  echo "worker $(hostname): $what"
}

log() {
  tail -n 100 -F "$state/log"
}

running() {
  ! flock --nonblock "$state/lock" true
}

main "$@"
