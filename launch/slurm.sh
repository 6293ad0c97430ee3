#!/bin/bash
# A training job on Slurm with one process for each GPU. JAX finds the other processes with Slurm's variables.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/imagenet1k.py:tiny --config.data.dir=DATA --workdir=runs/tiny
#   sbatch --array=0-2 --nodes=1 launch/slurm.sh … --config.seed=%a --workdir=runs/seed%a
#
# Options before launch/slurm.sh replace those below. In a job array, %a in an argument is the number of the task.
# Before a preemption or the time limit, the processes receive SIGTERM: they save and exit with status 143. The job is
# then requeued and resumes when it starts again. It is also requeued when a process is lost or fails, but not after
# `scancel JOB`, an error that you have to fix (status 2) or Ctrl-C (130). tests/clusters/test_slurm.py runs this script
# on Slurm.
#SBATCH --job-name=convnext
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%j.log
MAX_RESTARTS=10 # a job that fails after this number of restarts is not requeued; a job that was saved is always requeued

set -- "${@//%a/${SLURM_ARRAY_TASK_ID-%a}}"
# After an error of one process, all of them exit with its status. If a process was killed, --wait ends the others.
# Since Slurm 22.05, srun does not read --cpus-per-task of the job.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py "$@" &
trap : TERM # Slurm sends SIGTERM to the processes and may send it to this shell, which still has to requeue the job
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # a signal interrupts `wait` while srun is still running
    status=0
    wait $! || status=$?
done
# `scancel JOB` ends the processes with SIGTERM too, but the job is then no longer running.
is_cancelled() { ! scontrol show job "$SLURM_JOB_ID" | grep -qE 'JobState=RUNNING|Reason=TimeLimit'; }
case $status in
0 | 2 | 130) ;;
143) is_cancelled || scontrol requeue "$SLURM_JOB_ID" ;;
*)
    if is_cancelled; then
        echo "train.py ended with status $status; Slurm ends the job" >&2
    elif [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
        echo "train.py ended with status $status: the job is requeued" >&2
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "train.py ended with status $status after $SLURM_RESTART_COUNT restarts: see the errors above" >&2
    fi
    ;;
esac
exit "$status"
