#!/usr/bin/env bash
# Submits a dopsd_jax command to a GKE cluster of TPUs with XPK; every host runs it.
#
#   bash launch/xpk.sh --cluster CLUSTER --name NAME --zone ZONE --type v6e-16 [OPTIONS] -- train ..
#
#   --cluster CLUSTER  made before with: xpk cluster create
#   --name NAME        of the workload; a new one for every submission
#   --zone ZONE        such as us-east5-b
#   --type TYPE        of the slice: v5litepod-16, v5p-32, v6e-16, ..
#   --slices NUMBER    default 1
#   --project PROJECT  default: gcloud's own
#   --image IMAGE      container the working tree is put into; default python:3.12
#   --restarts NUMBER  after failures and preemptions; default 10
#   --dry-run          print the command and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR
source launch/common.sh
parse launch/xpk.sh \
  "cluster! name! zone! type! slices=1 project= image=python:3.12 restarts=10" "$@"
[[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || fail "--slices: expected a number from 1, got $SLICES"
[[ "$RESTARTS" =~ ^[0-9]+$ ]] || fail "--restarts: expected a number from 0, got $RESTARTS"
# shellcheck disable=SC2153
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] ||
  fail "--name: expected up to 39 of a-z, 0-9 and -, a letter first, got $NAME"
run xpk workload create --cluster "$CLUSTER" --workload "$NAME" --zone "$ZONE" \
  ${PROJECT:+--project "$PROJECT"} --tpu-type "$TYPE" --num-slices "$SLICES" \
  --max-restarts "$RESTARTS" --base-docker-image "$IMAGE" --script-dir . \
  --command "$(quote bash launch/run.sh tpu "${COMMAND[@]}")"
