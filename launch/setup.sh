#!/usr/bin/env bash
# Makes .venv and installs the package with the extras named in the arguments; sourced by the other scripts.
#   PYTHON=python3.12 ./launch/quickstart.sh   takes another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
python=${PYTHON:-python3}
"$python" - <<'EOF' || { echo "Python 3.11 or newer is needed: set PYTHON to one" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
EOF

[ -x .venv/bin/python ] || "$python" -m venv .venv
# Installed anew only when setup.cfg or the place of the checkout changed.
stamp=".venv/installed-${extras:-base}"
wanted="$(cksum setup.cfg) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (about a minute) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
  echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
