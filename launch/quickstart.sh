#!/usr/bin/env bash
# Fresh machine -> environment, a new style learned by the shipped model, before and after, a LoRA.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/setup.sh" ""
exec "$VENV/bin/python" -m dopsd_jax.quickstart "$@"
