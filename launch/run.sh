#!/usr/bin/env bash
# One machine's part of a run: the environment, then a dopsd_jax command. The other scripts call it.
#
#   bash launch/run.sh EXTRA COMMAND [ARGUMENTS..]     (EXTRA of pyproject.toml: cuda, tpu)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/setup.sh" "$1"
exec "$VENV/bin/python" -m "dopsd_jax.$2" "${@:3}"
