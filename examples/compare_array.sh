#!/usr/bin/env bash
#SBATCH --job-name=deme-compare
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# A table of methods over eight array tasks that see one folder. Each task takes the next free job
# (a training, or a merge with its measurement) until none is left; a task that is stopped saves its
# state, exits with 75 and goes back into the queue. The last one to end has the whole table; so has
#
#   deme compare table1 --table
#
# The base and the run's settings come from the deme.toml in this folder:
#
#   deme split google/ddpm-cifar10-32 --data cifar10 -n 4
#   sbatch examples/compare_array.sh
set -uo pipefail

deme compare "${1:-table1}" --dtype bf16 &
child=$!
trap 'kill -USR1 $child' USR1
wait $child
code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done   # a trapped signal ends one wait
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
