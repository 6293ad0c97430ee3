#!/bin/bash
# A training job on a Cloud TPU pod. Creates the pod as a queued resource, installs this commit on all its hosts and
# trains; after a preemption it creates the pod again and resumes. JAX finds the other hosts automatically. Needs gcloud
# with a login, and for several hosts `ssh-add ~/.ssh/google_compute_engine`.
#
#   ZONE=us-west4-a TYPE=v5litepod-64 VERSION=v2-alpha-tpuv5-lite launch/tpu_pod.sh NAME \
#       --config=configs/imagenet1k.py:tiny --config.data.dir=/mnt/data --workdir=/mnt/runs/tiny
#
# All hosts must share /mnt/data and /mnt/runs (Filestore); SETUP='COMMAND' runs on every host first, for example to
# mount them. The workdir can also be gs://BUCKET/RUN. SLICES=2 creates a multi-slice pod. At the end, the script deletes
# the pod and exits with the exit status of train.py. If the script itself is stopped, the pod stays and costs money.
# tests/clusters/test_tpu_pod.py runs this script with a simulated gcloud; it has not been run on a pod.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=$1
shift
: "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${SLICES:=1}" "${SETUP:=true}"
pod() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
state() { pod describe "$NAME" --format='value(state.state)' || echo UNKNOWN; }
# Runs a shell command on all hosts of all slices. When gcloud loses a connection, it runs the command again, up to nine
# times; then the exit status is 255. Therefore the commands below can be run more than once.
everywhere() { pod ssh "$NAME" --node=all --worker=all --command="$1"; }
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --prefix=run/ --output="$archive" HEAD

# The Python of the pod's image is older than 3.11, so uv installs one.
install="tar -xzf run.tar.gz && cd run && python3 -m pip install --quiet uv &&
    python3 -m uv venv --quiet --allow-existing --python=3.12 .venv &&
    python3 -m uv pip install --quiet --python=.venv/bin/python -r requirements.txt 'jax[tpu]' gcsfs google-cloud-storage"
# Training runs in the background and survives a lost connection; a second connection shows the output of the same run.
train="cd run || exit
    if mkdir started 2>/dev/null; then
        (trap '' HUP; .venv/bin/python train.py $(printf '%q ' "$@"); echo \$? >status.new; mv status.new status) \
            >log 2>&1 </dev/null &
    fi
    until [ -e log ]; do sleep 1; done
    until [ -e status ]; do sleep 1; done &
    tail --lines=+1 --follow --pid=\$! log
    exit \"\$(cat status)\""

while true; do
    nodes=(--node-id="$NAME")
    [ "$SLICES" -gt 1 ] && nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    pod create "$NAME" "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot
    while now=$(state) && [ "$now" != ACTIVE ] && [ "$now" != SUSPENDED ]; do
        if [ "$now" = FAILED ]; then
            echo "$NAME is FAILED: see gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2
            exit 1
        fi
        sleep 30
    done
    status=0 training=false
    if [ "$now" = ACTIVE ]; then
        everywhere "$SETUP" && pod scp "$archive" "$NAME:run.tar.gz" --node=all --worker=all &&
            everywhere "$install" && training=true && everywhere "$train" || status=$?
        now=$(state)
    fi
    pod delete "$NAME" --quiet --force
    if [ "$now" != ACTIVE ]; then
        echo "$NAME was $now: it is created again" >&2 # SUSPENDED: preempted
    elif $training && [[ $status = 143 || $status = 255 ]]; then
        echo "$NAME: train.py was stopped or its hosts were lost (status $status): the pod is created again" >&2
    else
        exit "$status"
    fi
done
