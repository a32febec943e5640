#!/usr/bin/env bash
# Trains on TPUs of a Google Kubernetes Engine cluster, through xpk: one slice or several.
#
#   launch/gke.sh run jpeglm-7b --cluster CLUSTER --type v5litepod-64 --slices 2 \
#       configs/jpeglm_7b.py --data.path 'gs://BUCKET/pictures/*.array_record' --run gs://BUCKET/runs/7b
#
#   run NAME TRAIN  copies this checkout onto the base image and submits `jpeglm train TRAIN` as a workload. Workers that were
#                   preempted come back by themselves, and the run goes on from its newest checkpoint. After `delete` the same
#                   command goes on too
#   status NAME     the workload, as xpk lists it
#   logs NAME       shows the log of worker 0 of slice 0 and follows it
#   delete NAME     the run saves and ends, and the workload goes
#
# TRAIN are the arguments of `jpeglm train`, after all options: CONFIG --run gs://... with CONFIG a file in configs/, or the
# gs://... of a run. Data, and a tokenizer if there is one, are gs:// too.
#
#   --cluster NAME   made by `xpk cluster create`                                 JPEGLM_CLUSTER  [none]
#   --type TYPE      accelerator: v5litepod-64 or v5e-64, v6e-64, v5p-64, v4-64   JPEGLM_TYPE     [none]
#   --slices N       slices of that type, trained on together (multislice)        JPEGLM_SLICES   [1]
#   --image IMAGE    base image, with Python 3.11 or newer                        JPEGLM_IMAGE    [python:3.12]
#   --zone ZONE      zone of Google Cloud                                         [that of `gcloud config`]
#   --project ID     project of Google Cloud                                      [that of `gcloud config`]
#   --dry-run        print the commands instead of running them
#
# Needs xpk (pip install xpk) with gcloud, kubectl and docker, as https://github.com/AI-Hypercomputer/xpk says.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Commands as of xpk 1.16.0, whose own --dry-run makes of them what is meant; see its docs/usage/workloads.md and docker.md.

cluster=${JPEGLM_CLUSTER:-}
type=${JPEGLM_TYPE:-}
slices=${JPEGLM_SLICES:-1}
image=${JPEGLM_IMAGE:-python:3.12}
zone=""
project=""

main() {
  local command=${1:-}
  case "$command" in
    "" | -h | --help) show_help; exit ;;
    run | status | logs | delete) shift ;;
    *) fail "unknown command '$command'; there are run, status, logs, delete" ;;
  esac
  name=${1:-}
  [ $# = 0 ] || shift
  check_name "$name"
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) dry_run=1; shift ;;
      --cluster | --type | --slices | --image | --zone | --project)
        [ -n "${2:-}" ] || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
      -*) fail "unknown option '$1'; --help shows those there are; what is for \`jpeglm train\` comes after CONFIG" ;;
      *) break ;;
    esac
  done
  [ -n "$cluster" ] || fail "the cluster is missing: --cluster NAME, or JPEGLM_CLUSTER"
  if [ "$command" = run ]; then
    check_type "$type"
    check_count --slices "$slices"
    check_training "$@"
  else
    [ $# = 0 ] || fail "$command takes no '$1'"
  fi
  needs xpk "pip install xpk"
  "$command" "$@"
}

run() {
  pack "$name"
  local directory="${archive%.tar.gz}"
  perform rm -rf "$directory"
  perform mkdir -p "$directory"
  perform tar -xzf "$archive" -C "$directory"
  # In the pod: install, then become the supervisor, so that the SIGTERM of a preemption reaches it. It restarts what crashes in
  # place; xpk starts all workers again for the exit statuses 42, 127 to 255, and 75, a run that was preempted and has saved.
  xpk_workload create --workload "$name" --tpu-type="$type" --num-slices="$slices" \
    --base-docker-image="$image" --script-dir="$directory" \
    --max-restarts=50 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
    --command="launch/setup.sh tpu,gcs && exec launch/supervise.sh $(quoted "$@")"
}

status() {
  xpk_workload list --filter-by-job="$name"
}

logs() {
  status  # which also points kubectl at the cluster
  perform kubectl logs --follow --tail=100 \
    --selector="xpk.google.com/workload=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

delete() {
  xpk_workload delete --workload "$name"
}

xpk_workload() {
  local arguments=(xpk workload "$@" --cluster "$cluster")
  [ -z "$zone" ] || arguments+=(--zone="$zone")
  [ -z "$project" ] || arguments+=(--project="$project")
  perform "${arguments[@]}"
}

main "$@"
