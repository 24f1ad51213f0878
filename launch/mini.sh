#!/usr/bin/env bash
# From shipped emoji to the mini model: data, blank weights, three training stages, and the judge
# that its pictures are measured with. Every part continues where it was stopped. Arguments: the
# directory for everything (default runs/mini).
#
# Takes hours on a CPU; on a GPU, DOPSD_EXTRA=cuda first.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/setup.sh" "${DOPSD_EXTRA:-}"
OUT="${1:-runs/mini}"

if [ ! -e "$OUT/world/judge_test/captions.json" ]; then
  "$VENV/bin/python" -m dopsd_jax.mini.build --out "$OUT/world"
fi
[ -e "$OUT/blank" ] ||
  "$VENV/bin/python" -m dopsd_jax.mini.model --data "$OUT/world" --out "$OUT/blank"

FROM=blank
for STAGE in vae base turbo; do
  "$VENV/bin/python" -m dopsd_jax.train --config "configs/mini/$STAGE.py" \
    --workdir "$OUT/$STAGE" --config.data="$OUT/world" \
    --config.model="$OUT/$FROM/pipeline" --config.vlm="$OUT/$FROM/qwen3_vl"
  FROM="$STAGE"
done
"$VENV/bin/python" -m dopsd_jax.train --config configs/mini/judge.py --workdir "$OUT/judge" \
  --config.data="$OUT/world" \
  --config.model="$OUT/blank/pipeline" --config.vlm="$OUT/blank/qwen3_vl"
echo "the mini model: $OUT/turbo/pipeline and $OUT/turbo/qwen3_vl"
