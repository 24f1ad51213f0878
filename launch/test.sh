#!/usr/bin/env bash
# Fresh machine -> environment, then lint and all tests. Arguments go to pytest.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/setup.sh" test
"$VENV/bin/python" -m ruff check .
# Two processes: most of the time goes into compiling, which uses one core. In the order of
# tests/conftest.py, longest files first.
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
