#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one slice or several, as a queued resource of Google Cloud.
#
#   launch/tpu_vm.sh supervise jpeglm-7b --type v5litepod-64 --capacity spot \
#       configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --run gs://BUCKET/runs/7b
#
# does everything: creates the slice, installs, starts the run, and creates the slice again when it was preempted, until the run
# is done. One by one:
#
#   create NAME     asks for the slice; `status` says when it is ACTIVE
#   install NAME    copies this checkout to all workers and installs it there
#   run NAME TRAIN  starts `jpeglm train TRAIN` on all workers and returns; refuses while something runs
#   logs NAME       shows the log of worker 0 and follows it
#   status NAME     state of the slice, and a line for each worker
#   stop NAME       the run saves and ends
#   resume NAME TRAIN     what is missing of create, install and run; a slice that is SUSPENDED (preempted) or FAILED is deleted
#                         and created again; a run that has ended before it was done goes on from its newest checkpoint
#   supervise NAME TRAIN  `resume`, again and again until the run is done, has failed, or was stopped; may itself be stopped and
#                         started again at any time
#   delete NAME     gives the slice back (after `stop`, or else `supervise` creates it again)
#
# TRAIN are the arguments of `jpeglm train`, after all options: CONFIG --run gs://... with CONFIG a file in configs/, or the
# gs://... of a run. Data, and a tokenizer if there is one, are gs:// too.
#
#   --type TYPE      accelerator: v5litepod-64 or v5e-64, v6e-64, v5p-64, v4-64   JPEGLM_TYPE     [none]
#   --slices N       slices of that type, trained on together (multislice)        JPEGLM_SLICES   [1]
#   --capacity KIND  on-demand, spot or reserved                                  JPEGLM_CAPACITY [on-demand]
#   --runtime NAME   software of the VMs                                          JPEGLM_RUNTIME  [as the type needs]
#   --zone ZONE      zone of Google Cloud           CLOUDSDK_COMPUTE_ZONE [that of `gcloud config`]
#   --project ID     project of Google Cloud        CLOUDSDK_CORE_PROJECT [that of `gcloud config`]
#   --dry-run        print the commands instead of running them; where they depend on answers, the longest way
#   JPEGLM_POLL      seconds between two looks at the slice                       [60]
#
# Needs gcloud, logged in, and with several workers a key that ssh-agent holds: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Commands as of Google Cloud SDK 528, whose `gcloud meta lint-gcloud-commands` accepts them, and states as of
# https://cloud.google.com/tpu/docs/queued-resources in November 2026.

type=${JPEGLM_TYPE:-}
slices=${JPEGLM_SLICES:-1}
capacity=${JPEGLM_CAPACITY:-on-demand}
runtime=${JPEGLM_RUNTIME:-}
zone=""
project=""
poll=${JPEGLM_POLL:-60}
assumed=""  # the answer that a dry run takes for granted

main() {
  local command=${1:-}
  case "$command" in
    "" | -h | --help) show_help; exit ;;
    create | install | run | logs | status | stop | resume | supervise | delete) shift ;;
    *) fail "unknown command '$command'; there are create, install, run, logs, status, stop, resume, supervise, delete" ;;
  esac
  everything=("$@")
  name=${1:-}
  [ $# = 0 ] || shift
  check_name "$name"
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) dry_run=1; shift ;;
      --type | --slices | --capacity | --runtime | --zone | --project)
        [ -n "${2:-}" ] || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
      -*) fail "unknown option '$1'; --help shows those there are; what is for \`jpeglm train\` comes after CONFIG" ;;
      *) break ;;
    esac
  done
  check "$command" "$@"
  "$command" "$@"
}

# What can be known to be wrong before anything happens.
check() {
  local command=$1 option
  shift
  case "$command" in
    create | resume | supervise)
      check_type "$type"
      check_count --slices "$slices"
      [[ " on-demand spot reserved " == *" $capacity "* ]] ||
        fail "--capacity must be on-demand, spot or reserved, not '$capacity'" ;;
  esac
  case "$command" in
    run | resume | supervise) check_training "$@" ;;
    *) [ $# = 0 ] || fail "$command takes no '$1'" ;;
  esac
  check_count JPEGLM_POLL "$poll"
  needs gcloud "https://cloud.google.com/sdk/docs/install says how"
  for option in zone project; do
    [ -z "${!option}" ] || continue
    local property=core/project
    [ "$option" = project ] || property=compute/zone
    assumed=mine ask gcloud config get-value "$property"
    [ -n "$answer" ] || fail "the $option is missing: give --$option, or \`gcloud config set $property ...\`"
  done
}

create() {
  local nodes=(--node-id="$name")
  [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  [ "$capacity" = on-demand ] || nodes+=("--$capacity")
  queued perform create "$name" --accelerator-type="$type" --runtime-version="${runtime:-$usual_runtime}" "${nodes[@]}"
}

install() {
  assumed="" on_workers ask "$status_of_worker"
  ! grep --quiet "^worker .*: running" <<<"$answer" || fail "$name is running: \`stop\` before another version is installed"
  install_and_no_questions
}

run() {
  assumed="" on_workers ask "$status_of_worker"
  ! grep --quiet "^worker .*: running" <<<"$answer" || fail "$name is running already; \`logs\` shows it, \`stop\` ends it"
  ! grep --quiet "^worker .*: absent" <<<"$answer" || fail "$name has workers without the package: \`install\` comes first"
  start "$@"
}

logs() {
  queued perform ssh "$name" --node=0 --worker=0 --command="jpeglm_jax/launch/worker.sh log"
}

status() {
  assumed=ACTIVE look_at_slice
  [ -n "$dry_run" ] || echo "$name: ${state:-not there}"
  [ "$state" != ACTIVE ] || on_workers perform "$status_of_worker"
}

stop() {
  on_workers perform "jpeglm_jax/launch/worker.sh stop"
}

delete() {
  queued perform delete "$name" --force
}

resume() {
  explain "if the slice is SUSPENDED or FAILED it is deleted; if there is none it is created"
  assumed=SUSPENDED look_at_slice
  while [ "$state" != ACTIVE ]; do
    case "$state" in
      "") create ;;
      SUSPENDED | FAILED)
        say "$name is $state: deleting it and creating it again"
        queued perform delete "$name" --force --quiet
        create ;;
      *) say "$name is $state: waiting for ACTIVE" ;;
    esac
    explain "every $poll s, until the slice is ACTIVE"
    [ -n "$dry_run" ] || sleep "$poll"
    assumed=ACTIVE look_at_slice
  done
  explain "if a worker is without the package it is installed; if one runs nothing the run is started"
  assumed="worker 0: absent" look_at_workers
  case "$workers" in
    running | done) say "$run is $workers" ;;
    absent) install_and_no_questions; start "$@" ;;
    *) start "$@" ;;
  esac
}

supervise() {
  if [ -n "$dry_run" ]; then
    resume "$@"
    explain "every $poll s the same, until the run is done"
    return
  fi
  resume_at_last
  while true; do
    sleep "$poll"
    workers=""
    # Over days gcloud fails now and then, and the run does not need it.
    if ! look_at_slice || { [ "$state" = ACTIVE ] && ! look_at_workers; }; then
      say "no answer from $name; asking again in $poll s"
      continue
    fi
    case "$state $workers" in
      "ACTIVE running") ;;
      "ACTIVE done") say "$run is done; \`delete\` gives the slice back"; return ;;
      "ACTIVE failed" | "ACTIVE stopped") say "$run has $workers; \`logs\` says more, \`resume\` goes on"; return 1 ;;
      *) resume_at_last ;;
    esac
  done
}

resume_at_last() {
  local failures=0
  until "$0" resume "${everything[@]}"; do
    failures=$((failures + 1))
    [ "$failures" -lt 10 ] || { say "that has failed 10 times in a row: giving up"; exit 1; }
    say "that has failed; trying again in $poll s"
    sleep "$poll"
  done
}

# Copies this checkout to every worker.
install_and_no_questions() {
  pack "$name"
  queued perform scp "$archive" "$name:jpeglm_jax.tar.gz" --node=all --worker=all
  on_workers perform "mkdir -p jpeglm_jax && tar -xzf jpeglm_jax.tar.gz -C jpeglm_jax && jpeglm_jax/launch/worker.sh install"
}

start() {
  on_workers perform "jpeglm_jax/launch/worker.sh start $(quoted "$@")"
}

# The state of the queued resource, in `state`; nothing if there is none. Of `list`, as `describe` fails on what is not there.
look_at_slice() {
  queued ask list --filter="name ~ /$name\$" --format="value(state.state)" || return
  state=$answer
}

status_of_worker='if [ -x jpeglm_jax/launch/worker.sh ]; then jpeglm_jax/launch/worker.sh status; '
status_of_worker+="else echo \"worker \$(hostname): absent\"; fi"

# What all workers together are with this run, in `workers`: absent or idle if any of them is, ... done if all are.
look_at_workers() {
  on_workers ask "$status_of_worker" || return
  local found="" what which
  while read -r _ _ what which _; do
    if [ -n "$which" ] && [ "$which" != "$run" ]; then  # that was another run
      [ "$what" != running ] || fail "$name runs $which: \`stop\` ends it"
      what=idle
    fi
    found="$found $what"
  done < <(grep "^worker " <<<"$answer")
  for workers in absent idle running failed stopped "done"; do
    [[ "$found " != *" $workers "* ]] || return 0
  done
  say "no worker of $name has said what it does: $answer"
  return 1
}

on_workers() {
  queued "$1" ssh "$name" --node=all --worker=all --command="$2"
}

# `perform` or `ask` a command about queued resources.
queued() {
  local how=$1 arguments
  shift
  arguments=(gcloud compute tpus queued-resources "$@")
  [ -z "$zone" ] || arguments+=(--zone="$zone")
  [ -z "$project" ] || arguments+=(--project="$project")
  "$how" "${arguments[@]}"
}

# What a command says, in `answer`; in a dry run `assumed`.
ask() {
  if [ -n "$dry_run" ]; then
    perform "$@"
    answer=$assumed
  else
    answer=$("$@")
  fi
}

main "$@"
