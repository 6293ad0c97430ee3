#!/bin/bash
# A training job on a Cloud TPU pod. Creates the pod as a queued resource, installs this checkout on all its hosts and
# trains; after a preemption it creates the pod again and resumes. JAX finds the other hosts automatically. Needs gcloud
# with a login. Untested: this script has not been run on a pod.
#
#   ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite launch/tpu_pod.sh NAME \
#       --config=configs/imagenet1k.py:tiny --config.data.dir=/mnt/data --workdir=/mnt/runs/tiny
#
# All hosts must share /mnt/data and /mnt/runs (Filestore); SETUP='COMMAND' runs on every host first, for example to
# mount them. The workdir can also be gs://BUCKET/RUN. SLICES=2 creates a multi-slice pod. The script exits with the exit
# status of train.py.
set -euo pipefail
NAME=$1
shift
: "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${SLICES:=1}" "${SETUP:=true}"
pod() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
# Runs a shell command on all hosts of all slices.
everywhere() { pod ssh --node=all --worker=all --command="$1"; }

while true; do
    nodes=(--node-id="$NAME")
    [ "$SLICES" -gt 1 ] && nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    pod create "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot
    while state=$(pod describe --format='value(state.state)'); [ "$state" != ACTIVE ]; do
        case $state in FAILED | SUSPENDED) echo "$NAME is $state: see gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2; exit 1 ;; esac
        sleep 30
    done
    everywhere "$SETUP"
    everywhere "git clone --depth=1 $(git remote get-url origin) run && cd run && python3 -m venv .venv &&
        .venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]' gcsfs google-cloud-storage"
    status=0
    everywhere "cd run && .venv/bin/python train.py $(printf '%q ' "$@")" || status=$?
    lost=$(pod describe --format='value(state.state)')
    pod delete --quiet --force
    # 143: train.py received SIGTERM and saved. 255: ssh lost its hosts. With any other status, train.py failed or ended.
    [ "$status" = 143 ] || [ "$status" = 255 ] || [ "$lost" != ACTIVE ] || exit "$status"
done
