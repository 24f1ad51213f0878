#!/usr/bin/env bash
# Fresh machine -> environment, a D-OPSD LoRA run on real photographs, samples, a LoRA file.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/setup.sh" quickstart
exec "$VENV/bin/python" -m dopsd_jax.quickstart "$@"
