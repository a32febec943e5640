#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest. `./launch/test.sh -m slow` runs the slow ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev

# The TPU's compiler, beside the environment: inside of it, every command would look for a TPU.
compiler="$PWD/.venv/tpu_compiler"
if [ ! -e "$compiler/libtpu/libtpu.so" ]; then
  echo "fetching the TPU's compiler ..."
  python -m pip install --quiet --disable-pip-version-check --no-deps --target "$compiler" \
    "$(sed -n 's/^ *\(libtpu==.*\)/\1/p' setup.cfg)" || echo "none for this machine: its tests are skipped"
fi
[ ! -e "$compiler/libtpu/libtpu.so" ] || export TPU_LIBRARY_PATH="$compiler/libtpu/libtpu.so"

# On CPU everywhere: the tests make eight virtual devices of it.
JAX_PLATFORMS=cpu python -m pytest "$@"
