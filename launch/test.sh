#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest. `./launch/test.sh -m slow` runs the slow ones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev

# On CPU everywhere: the tests make eight virtual devices of it.
JAX_PLATFORMS=cpu python -m pytest "$@"
