#!/usr/bin/env bash
#SBATCH --job-name=deme
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
# One expert on many GPUs: a process for each, which share every batch. The expert is that of one
# process up to rounding, so a kept run continues on any number of GPUs. All of them see one folder.
#
#   sbatch examples/many_gpus.sh 2/4 --p 0.3 --dtype bf16       # on a cluster
#   NUM_GPUS=8 examples/many_gpus.sh 2/4 --p 0.3 --dtype bf16   # on one machine
#   DEVICE=cpu NUM_GPUS=2 examples/many_gpus.sh 2/4 --p 0.3     # to try it without any
#
# SLURM sends SIGUSR1 to all processes two minutes before the time limit: they save once, exit with
# 75, and the job is put back into the queue. torchrun ends with 1 whatever its processes say, so a
# kept run is told by its checkpoint, and it waits 30 seconds for the state to be saved; where that
# is short, newer ones take --shutdown-timeout.
set -uo pipefail
range=${1:?the range to train, as in 2/4}
shift

if [ -n "${SLURM_JOB_ID:-}" ]; then
    srun --kill-on-bad-exit=1 deme finetune --range "$range" "$@"
    code=$?
    if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
fi

exec torchrun --standalone --nproc-per-node "${NUM_GPUS:-2}" -m deme_cli \
    finetune --range "$range" --device "${DEVICE:-auto}" "$@"
