# shellcheck shell=bash
# What the launchers share; sourced by tpu_vm.sh, gke.sh, worker.sh and supervise.sh. Kept to bash 3.2, which macOS has.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=

# Errors of use: one line, exit status 2, before anything was started.
fail() {
  echo "launch/$(basename "$0"): error: $*" >&2
  exit 2
}

say() {
  [ -n "$dry_run" ] || echo "$(date '+%Y-%m-%d %H:%M:%S') $*" >&2
}

# The comment at the head of a script is its help.
show_help() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
}

# A command as one can paste it.
quoted() {
  printf '%q ' "$@" | sed 's/ $//'
}

# Runs a command after showing it; --dry-run only shows it. Everything that changes something goes through here.
perform() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
    echo
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# A word on the commands that --dry-run shows.
explain() {
  [ -z "$dry_run" ] || echo "# $*"
}

needs() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed, or not on the PATH: $2"
}

# Names of slices and of workloads, as Google Cloud and Kubernetes want them.
check_name() {
  [ -n "$1" ] || fail "the name is missing; --help shows what goes where"
  [[ "$1" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "the name '$1' must be lower-case letters, digits and '-', begin with a letter, and have 40 characters at most"
}

# The run directory that the arguments of `jpeglm train` name, in `run`.
find_run() {
  [ $# -gt 0 ] || fail "what to train is missing: CONFIG --run RUN ..., or RUN, as for \`jpeglm train\`"
  run=
  [[ "$1" == *.py ]] || run=$1
  local argument before=
  for argument in "$@"; do
    [ "$before" != --run ] || run=$argument
    [[ "$argument" != --run=* ]] || run=${argument#--run=}
    before=$argument
  done
  [ -n "$run" ] || fail "name the run directory: $1 --run RUN"
}

# Arguments of `jpeglm train` that machines in the cloud can follow: their disks are empty at first, and go with them.
check_training() {
  find_run "$@"
  [[ "$run" == gs://?* ]] ||
    fail "the run directory must be gs://BUCKET/..., which all workers see and which outlives them, not '$run'"
  case "$1" in
    gs://*) ;;
    configs/*) [ -e "$checkout/$1" ] || fail "there is no $1 in $checkout" ;;
    *) fail "workers get the configs/ of this checkout: name a file in it, configs/NAME.py, or a run gs://..., not '$1'" ;;
  esac
}

# Checks an accelerator type; leaves Google Cloud's name for it in `type`, and what its VMs usually run in `usual_runtime`.
# https://cloud.google.com/tpu/docs/runtimes, and .../tpu/docs/v4, v5e, v5p, v6e for the sizes (v4 and v5p count cores).
# shellcheck disable=SC2034  # `usual_runtime` is for tpu_vm.sh
check_type() {
  [ -n "$1" ] || fail "the accelerator type is missing: --type v5litepod-64, say, or JPEGLM_TYPE"
  type=${1/#v5e-/v5litepod-}  # as people say it
  local size=${type#*-}
  case "$type" in
    v4-* | v5p-*)
      local largest=4096
      usual_runtime=tpu-ubuntu2204-base
      [[ "$type" == v4-* ]] || { largest=12288 usual_runtime=v2-alpha-tpuv5; }
      [[ "$size" =~ ^[1-9][0-9]{0,4}$ ]] && [ $((size % 8)) = 0 ] && [ "$size" -le "$largest" ] && return ;;
    v5litepod-* | v6e-*)
      usual_runtime=v2-alpha-tpuv5-lite
      [[ "$type" == v5litepod-* ]] || usual_runtime=v2-alpha-tpuv6e
      [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] && return ;;
  esac
  fail "unknown accelerator type '$1'; known are v5litepod-N (or v5e-N) and v6e-N for N of 1, 4, 8, 16, 32, 64, 128, 256," \
    "v4-N and v5p-N for N cores, multiples of 8 up to 4096 and 12288"
}

check_count() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number from 1, not '$2'"
}

# Puts into `archive` what a worker needs of this checkout: code, configs and launchers, as they are now, committed or not.
pack() {
  archive="${XDG_CACHE_HOME:-$HOME/.cache}/jpeglm/launch/$1.tar.gz"
  perform mkdir -p "$(dirname "$archive")"
  perform tar --exclude=__pycache__ -czf "$archive" -C "$checkout" \
    LICENSE README.md configs jpeglm_jax launch pyproject.toml setup.cfg
}
