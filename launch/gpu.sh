#!/usr/bin/env bash
# Runs a dopsd_jax command on this machine's NVIDIA GPUs; makes .venv at the first start.
#
#   bash launch/gpu.sh [--devices 0,1] [--dry-run] -- train --config FILE --workdir DIR ..
#
#   --devices LIST   GPUs to use, as nvidia-smi numbers them; default: all
#   --dry-run        print the commands and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR
source launch/common.sh
parse launch/gpu.sh "devices=" "$@"
[[ "${DEVICES:=}" =~ ^([0-9]+(,[0-9]+)*)?$ ]] || fail "--devices: expected 0 or 0,1,.., got $DEVICES"
run env ${DEVICES:+"CUDA_VISIBLE_DEVICES=$DEVICES"} bash launch/run.sh cuda "${COMMAND[@]}"
