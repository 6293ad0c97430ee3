#!/bin/bash
# A training job on Slurm with one process for each GPU. JAX finds the other processes with Slurm's variables.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/imagenet1k.py:tiny --config.data.dir=DATA --workdir=runs/tiny
#
# Before a preemption or the time limit, the processes receive SIGTERM: they save and exit with status 143. The job is
# then requeued and resumes when it starts again. Untested: this script has not been run on a cluster.
#SBATCH --job-name=convnext
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%j.log

# --kill-on-bad-exit: when one process fails, Slurm ends all of them. srun runs in the background so that this shell can
# handle SIGTERM and requeue the job.
srun --kill-on-bad-exit=1 .venv/bin/python train.py "$@" &
trap 'kill -TERM $!' TERM
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # a signal interrupts `wait` while srun is still running
    status=0
    wait $! || status=$?
done
[ "$status" = 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
