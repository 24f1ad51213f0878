#!/usr/bin/env bash
# Fresh machine -> environment, then lint and all tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh" test
"$VENV/bin/python" -m ruff check .
exec "$VENV/bin/python" -m pytest "$@"
