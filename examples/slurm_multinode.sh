#!/usr/bin/env bash
#SBATCH --job-name=deme
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
# The pipeline over several nodes, a process for each GPU, all of which see one folder: each expert in
# turn on all of them, then merge, samples and evaluation in the same allocation.
#
#   deme split google/ddpm-cifar10-32 --data cifar10 -n 4
#   sbatch examples/slurm_multinode.sh --p 0.3 --dtype bf16      # options of `deme finetune`
#
# RANGE: one range instead of all, as in RANGE=2/4, after which the job ends (a job for each range, with
# as many nodes as it is to have). SEARCH, OBJECTIVE: how coefficients are looked for. NUM: images of
# samples and evaluation.
#
# Two minutes before the time limit SLURM sends SIGUSR1 to the processes of the step that runs: they
# save, exit with 75, and the job is put back into the queue. It begins again at the top, where what is
# done is passed over and what was begun goes on, on any number of nodes.
set -uo pipefail

together() {
    srun --kill-on-bad-exit=1 deme "$@" && return
    local code=$?
    if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
}

together finetune --range "${RANGE:-all}" "$@"
if [ -n "${RANGE:-}" ]; then exit; fi
[ -e merged.safetensors ] || together merge ft_*.safetensors \
    --search "${SEARCH:-cmaes}" --objective "${OBJECTIVE:-fid@1k:16,fid@5k}"
[ -e ensemble.safetensors ] || together ensemble-sample ft_*.safetensors \
    -n "${NUM:-50000}" -o ensemble.safetensors
together eval base.safetensors ft_*.safetensors merged.safetensors --num "${NUM:-50000}"
