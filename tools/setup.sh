#!/bin/sh
# make setup: a virtual environment in .venv with the package (editable) and what its tests need.
set -eu
python=$1
fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" > /dev/null || fail "there is no '$python'; name a Python 3.11 or later: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" -V) is too old, 3.11 or later is needed: make PYTHON=/path/to/python3"

if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    if "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        "$python" -m venv --clear .venv
    elif "$python" -m virtualenv --version > /dev/null 2>&1; then
        "$python" -m virtualenv -q --clear .venv
    else
        fail "$("$python" -V) at $(command -v "$python") cannot make a virtual environment (it has no ensurepip);" \
            "on Debian and Ubuntu: sudo apt-get install python3-venv"
    fi
fi
echo "setup: installing the package and what its tests need into .venv"
.venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[test]'
touch .venv/stamp
