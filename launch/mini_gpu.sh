#!/usr/bin/env bash
# Makes the mini model on this machine's NVIDIA GPU and packs it, for machines without network.
#
#   bash launch/mini_gpu.sh --out DIR [--minutes 9] [--budget gpu] [--python PYTHON] [--vendor DIR]
#
#   --out DIR        where the packed files go: made.tar.gz, in parts of 15 MB
#   --minutes N      end well after about so many minutes, packing excluded
#   --budget B       gpu, or tiny to try this script out
#   --work DIR       where everything else goes (default: runs/mini_gpu)
#   --python PYTHON  a Python with jax[cuda], flax, optax, orbax-checkpoint and transformers
#                    (default: python3)
#   --vendor DIR     where launch/gpu_bench.sh --pack put the other packages
#   --dry-run        print the command and run nothing
#
# Put the parts together again, and take the files over:
#   cat DIR/made.tar.gz.* | tar xz -C DIR && cp -r DIR/shipped/* dopsd_jax/assets/
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR
source launch/common.sh
options launch/mini_gpu.sh "out! minutes=9 budget=gpu work=runs/mini_gpu python=python3 vendor=" "$@"
[ ${#REST[@]} -eq 0 ] || fail "nothing can come after --; see launch/mini_gpu.sh --help"
export PYTHONPATH=".${VENDOR:+:$VENDOR}" XLA_PYTHON_CLIENT_MEM_FRACTION=.6
run "$PYTHON" -m dopsd_jax.mini.make --out "$WORK" --budget "$BUDGET" --minutes "$MINUTES"
[ -z "$DRY_RUN" ] || exit 0
mkdir -p "$OUT"
for STAGE in vae base turbo judge; do
  [ -d "$WORK/$STAGE" ] || continue  # the VAE, where that of the package serves
  mkdir -p "$WORK/report/$STAGE"
  cp "$WORK/$STAGE/metrics.jsonl" "$WORK/$STAGE/config.json" "$WORK/report/$STAGE/"
  # The last pictures of the stage; the judge draws none.
  find "$WORK/$STAGE/samples" -name "*.png" 2>/dev/null | sort | tail -n 1 |
    xargs -r -I{} cp {} "$WORK/report/$STAGE/"
done
tar -C "$WORK" -czf - shipped report | split -b 15m - "$OUT/made.tar.gz."
ls -l "$OUT"
