# Sourced by digits.sh and scenes_study.sh: an environment in $VENV, made where it is missing, first on PATH.
. launch/environment.sh
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

if [ ! "$VENV/installed" -nt setup.cfg ]; then # missing, or made for other packages
    echo "== install into $VENV (torch is large: a minute or more)"
    "$PYTHON" - <<'PYTHON'
import sys

version = sys.version_info[:2]
if not (3, 10) <= version <= (3, 12):
    sys.exit(f"found Python {version[0]}.{version[1]}, expected 3.10 to 3.12; set PYTHON, say to python3.12")
PYTHON
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --editable ".[quickstart]"
    touch "$VENV/installed"
fi
PATH="$(cd "$VENV/bin" && pwd):$PATH"
