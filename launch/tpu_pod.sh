#!/bin/bash
# A Cloud TPU pod by queued resources: asks for it, installs the checkout on all its hosts, trains, and asks anew when a
# preemption took it. JAX finds the other hosts by itself. Needs gcloud, logged in. Tried on no pod.
#
#   ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite launch/tpu_pod.sh NAME \
#       --config=configs/imagenet1k.py:tiny --config.data.dir=/mnt/data --workdir=/mnt/runs/tiny
#
# /mnt/data and /mnt/runs must be the same file system on all hosts (Filestore), mounted by the line SETUP; or the
# workdir is gs://BUCKET/RUN.
# SLICES=2 asks for a multi-slice pod. The run's last words are this command's exit status.
set -euo pipefail
NAME=$1
shift
: "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${SLICES:=1}" "${SETUP:=true}"
pod() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
# Runs a line on all hosts of all slices.
everywhere() { pod ssh --node=all --worker=all --command="$1"; }

while true; do
    nodes=(--node-id="$NAME")
    [ "$SLICES" -gt 1 ] && nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    pod create "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot
    while state=$(pod describe --format='value(state.state)'); [ "$state" != ACTIVE ]; do
        case $state in FAILED | SUSPENDED) echo "$NAME is $state: see gcloud … describe" >&2; exit 1 ;; esac
        sleep 30
    done
    everywhere "$SETUP"
    everywhere "git clone --depth=1 $(git remote get-url origin) run && cd run && python3 -m venv .venv &&
        .venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]' gcsfs google-cloud-storage"
    status=0
    everywhere "cd run && .venv/bin/python train.py $(printf '%q ' "$@")" || status=$?
    lost=$(pod describe --format='value(state.state)')
    pod delete --quiet --force
    # 143: told to stop, and saved. 255: the connection ended with the hosts. Anything else is an error, or the end.
    [ "$status" = 143 ] || [ "$status" = 255 ] || [ "$lost" != ACTIVE ] || exit "$status"
done
