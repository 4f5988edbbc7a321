#!/usr/bin/env bash
# Install into a virtual environment ($VENV, default .venv) and run the tests, two files at a time:
#   bash launch/test.sh [pytest arguments]     # `-n 0` for one at a time in this process, as a debugger needs
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

if [ ! "$VENV/installed-test" -nt setup.cfg ]; then # missing, or made for other packages
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --editable ".[test]"
    touch "$VENV/installed" "$VENV/installed-test"
fi
# In alphabetical order, which spreads the long files.
exec "$VENV/bin/python" -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder "$@"
