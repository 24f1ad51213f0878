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
#
# Put the parts together again, and take the files over:
#   cat DIR/made.tar.gz.* | tar xz -C DIR && cp -r DIR/shipped/* dopsd_jax/assets/
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="" MINUTES=9 BUDGET=gpu WORK=runs/mini_gpu PYTHON=python3 VENDOR=""
fail() { echo "error: $*" >&2; exit 1; }
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --out | --minutes | --budget | --work | --python | --vendor)
      [ $# -gt 1 ] || fail "$1 needs a value"
      name="${1#--}"
      printf -v "${name^^}" %s "$2"
      shift 2 ;;
    *) fail "unknown option $1; see launch/mini_gpu.sh --help" ;;
  esac
done
[ -n "$OUT" ] || fail "needed: --out; see launch/mini_gpu.sh --help"
export PYTHONPATH=".${VENDOR:+:$VENDOR}" XLA_PYTHON_CLIENT_MEM_FRACTION=.6
mkdir -p "$OUT" "$WORK"
"$PYTHON" -m dopsd_jax.mini.make --out "$WORK" --budget "$BUDGET" --minutes "$MINUTES"
for STAGE in vae base turbo judge; do
  mkdir -p "$WORK/report/$STAGE"
  cp "$WORK/$STAGE/metrics.jsonl" "$WORK/$STAGE/config.json" "$WORK/report/$STAGE/"
  # The last pictures of the stage; the judge draws none.
  find "$WORK/$STAGE/samples" -name "*.png" 2>/dev/null | sort | tail -n 1 |
    xargs -r -I{} cp {} "$WORK/report/$STAGE/"
done
tar -C "$WORK" -czf - shipped report | split -b 15m - "$OUT/made.tar.gz."
ls -l "$OUT"
