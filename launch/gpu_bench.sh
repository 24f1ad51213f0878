#!/usr/bin/env bash
# Measures the D-OPSD LoRA step on this machine's NVIDIA GPU, beside a torch loop of the published
# one on the same card. Downloads nothing and takes at most 9 minutes.
#
#   bash launch/gpu_bench.sh [--python PYTHON] [--vendor DIR] [-- options of dopsd_jax.bench]
#   bash launch/gpu_bench.sh --pack DIR
#
#   --python PYTHON  a Python with jax[cuda], flax, optax, torch, peft and transformers
#                    (default: python3)
#   --vendor DIR     where --pack put the other packages; default: that Python has them all
#   --pack DIR       on a machine with network, download the packages that such a Python may lack
#                    into DIR, to be copied beside this checkout
#   --dry-run        print the commands and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR
source launch/common.sh
WORDS=()
for word in "$@"; do
  WORDS+=("$word")
  [ "$word" != -- ] || WORDS+=(bench)
done
[[ " $* " == *" -- "* ]] || WORDS+=(-- bench)
set -- "${WORDS[@]}"
parse launch/gpu_bench.sh "python=python3 vendor= pack=" "$@"
if [ -n "$PACK" ]; then
  # Pure Python, and without what they require: jax and torch stay those of the machine.
  run "$PYTHON" -m pip install --quiet --no-deps --target "$PACK" \
    diffusers ml-collections absl-py etils importlib-metadata zipp qwix opt-einsum
  exit
fi
run env "PYTHONPATH=.${VENDOR:+:$VENDOR}" XLA_PYTHON_CLIENT_MEM_FRACTION=.95 \
  "$PYTHON" -m "dopsd_jax.${COMMAND[0]}" "${COMMAND[@]:1}"
