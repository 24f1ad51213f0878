#!/usr/bin/env bash
# From shipped emoji to the mini model: the world's pictures, three training stages, and the judge
# that its pictures are measured with. Every part continues where it was stopped.
#
#   bash launch/mini.sh [options of dopsd_jax.mini.make]
#
# Takes hours on a CPU. On a GPU: DOPSD_EXTRA=cuda bash launch/mini.sh --budget gpu --minutes 9
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/setup.sh" "${DOPSD_EXTRA:-}"
exec "$VENV/bin/python" -m dopsd_jax.mini.make "$@"
