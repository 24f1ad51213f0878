#!/usr/bin/env bash
# Makes a queued TPU resource, or takes the one of that name, and runs a dopsd_jax command on all its
# workers. Start it again after a preemption: the run continues from its last checkpoint.
#
#   bash launch/tpu_vm.sh --name NAME --zone ZONE --type v6e-16 [OPTIONS] -- train --config FILE ..
#
#   --name NAME        of the queued resource and of its node
#   --zone ZONE        such as us-east5-b
#   --type TYPE        accelerator type: v5litepod-16, v5p-32, v6e-16, ..
#   --project PROJECT  default: gcloud's own
#   --runtime VERSION  software of the workers; default: what Google names for the type
#   --setup COMMANDS   run first on every worker, such as copying weights or installing a Python of
#                      3.11 or newer (then also: --python python3.12)
#   --python PYTHON    interpreter on the workers; default python3
#   --spot             cheaper, may be taken away
#   --dry-run          print the commands and run nothing
#
# The working tree is sent as it was last committed. The run lives as long as this script: start it
# in tmux or screen. The resource stays, and costs, until it is deleted:
#
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source-path=SCRIPTDIR
source launch/common.sh
parse launch/tpu_vm.sh "name! zone! type! project= runtime= setup= python=python3 spot:" "$@"
case "${RUNTIME:-$TYPE}" in
  "${RUNTIME:-none}") ;;
  v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
  v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
  v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
  v4-*) RUNTIME=tpu-ubuntu2204-base ;;
  *) fail "--type $TYPE: its software is not known here; name it with --runtime" ;;
esac
WHERE=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
QUEUED=(gcloud compute tpus queued-resources)
STATE=("${QUEUED[@]}" describe "$NAME" "${WHERE[@]}" '--format=value(state.state)')
state() { "${STATE[@]}" 2>/dev/null || echo NONE; }
NOW=NONE
[ -n "$DRY_RUN" ] || NOW="$(state)"

case "$NOW" in
  SUSPENDED | FAILED)  # preempted: such a resource never comes back
    run "${QUEUED[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet
    NOW=NONE ;;
esac
if [ "$NOW" = NONE ]; then
  [ -z "$DRY_RUN" ] || echo "# unless $NAME is there:"
  run "${QUEUED[@]}" create "$NAME" --node-id "$NAME" "${WHERE[@]}" --accelerator-type "$TYPE" \
    --runtime-version "$RUNTIME" ${SPOT:+--spot}
fi
if [ -n "$DRY_RUN" ]; then
  echo "# every 30 s until it is ACTIVE:"
  run "${STATE[@]}"
fi
until [ -n "$DRY_RUN" ] || [ "$NOW" = ACTIVE ]; do
  [[ "$NOW" != SUSPENDED && "$NOW" != FAILED ]] || fail "$NAME is $NOW; start again"
  NOW="$(state)"
  echo "$NAME: $NOW"
  [ "$NOW" = ACTIVE ] || sleep "${DOPSD_POLL:-30}"
done

CODE="$(git rev-parse --short HEAD).tar.gz"
[ -n "$DRY_RUN" ] && CODE=COMMIT.tar.gz
TPU=(gcloud compute tpus tpu-vm)
run git archive --format=tar.gz --prefix=dopsd_jax/ --output="/tmp/$CODE" HEAD
run "${TPU[@]}" scp "/tmp/$CODE" "$NAME:/tmp/$CODE" --worker=all "${WHERE[@]}"
THERE="$(quote env "PYTHON=$PYTHON" bash launch/run.sh tpu "${COMMAND[@]}")"
run "${TPU[@]}" ssh "$NAME" --worker=all "${WHERE[@]}" \
  --command="${SETUP:+$SETUP && }tar xzf /tmp/$CODE && cd dopsd_jax && $THERE"
