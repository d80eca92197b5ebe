#!/usr/bin/env bash
#SBATCH --job-name=deme
#SBATCH --array=1-4
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# One expert per array task. Two minutes before the time limit SLURM sends SIGUSR1: deme saves its
# state and exits with 75, the task is put back into the queue, and the same command continues.
#
#   deme split google/ddpm-cifar10-32 --data cifar10 -n 4
#   array=$(sbatch --parsable examples/slurm_array.sh --p 0.3 --dtype bf16)   # of `deme finetune`
#   sbatch --dependency=afterok:$array --gres=gpu:1 \
#          --array=1-4 --wrap 'deme merge ft_*.safetensors --search cmaes --objective fid@1k:16,fid@5k'
#
# The four tasks of the search share its trials: each runs the same command in the same folder, takes
# what is free from merged.trials.jsonl, and one of them writes merged.safetensors. A task that starts
# after that is refused (exit 2), as an existing file always is.
#
# RANGES: into how many the timesteps are divided, where that is not the number of tasks (as when one
# task is submitted again, with --array=2).
set -uo pipefail
N=${RANGES:-${SLURM_ARRAY_TASK_COUNT:-4}}

deme finetune --range "$SLURM_ARRAY_TASK_ID/$N" "$@" &
child=$!
trap 'kill -USR1 $child' USR1
wait $child
code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done   # a trapped signal ends one wait
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
