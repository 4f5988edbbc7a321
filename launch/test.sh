#!/usr/bin/env bash
# Install into a virtual environment ($VENV, default .venv) and run the tests: bash launch/test.sh [pytest
# arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

if [ ! -e "$VENV/installed-test" ]; then
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --editable ".[test]"
    touch "$VENV/installed" "$VENV/installed-test"
fi
exec "$VENV/bin/python" -m pytest -m "not slow and not gpu" "$@"
