#!/bin/bash
# Slurm: a process for each GPU, on as many nodes as you ask for. JAX finds the others by Slurm's variables.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/imagenet1k.py:tiny --config.data.dir=DATA --workdir=runs/tiny
#
# Before a preemption or the end of the time the processes get SIGTERM: they save, end with status 143, and the job goes
# back into the queue, where it resumes. Tried on no cluster.
#SBATCH --job-name=convnext
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%j.log

# --kill-on-bad-exit: with one process Slurm ends all. In the background, so that a signal to this shell is no end to it.
srun --kill-on-bad-exit=1 .venv/bin/python train.py "$@" &
trap 'kill -TERM $!' TERM
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # a signal ends the first wait
    status=0
    wait $! || status=$?
done
[ "$status" = 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
