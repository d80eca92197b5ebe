#!/usr/bin/env bash
# The pipeline on all GPUs of one machine, a process for each: they share every batch of an expert,
# the images of samples and evaluations, and the trials of a search. What comes out is that of one
# process, up to rounding; only searches other than grid and random may ask for other points. Run it
# again after a stop: what is done stays, what was begun goes on, on any number of GPUs.
#
#   NUM_GPUS=8 examples/many_gpus.sh FOLDER             # FOLDER: where `deme split` was run, or new
#   DEVICE=cpu NUM_GPUS=2 STEPS=20 NUM=64 examples/many_gpus.sh    # to try it on digits, without any
#
# NUM_GPUS: all of them unless set. MODEL, DATA, RANGES: what a new folder is split from (digits, 4).
# STEPS: updates of each expert; NUM: images of an evaluation (unset: those of deme.toml).
#
# The `--` keeps torchrun from taking options of deme for its own (--num, --start). It ends with 1
# whatever its processes say, and after a signal waits 30 seconds for states to be saved; where that
# is short, newer ones take --shutdown-timeout.
set -euo pipefail
mkdir -p "${1:-many-gpus-run}" && cd "${1:-many-gpus-run}"

together() {
    torchrun --standalone --nproc-per-node "${NUM_GPUS:-auto}" -m -- \
        deme_cli "$@" --device "${DEVICE:-auto}"
}

[ -e deme.toml ] || deme split "${MODEL:-digits}" --data "${DATA:-digits}" -n "${RANGES:-4}"
together finetune --range all ${STEPS:+--steps "$STEPS"}
[ -e merged.safetensors ] ||
    together merge ft_*.safetensors --search "${SEARCH:-grid}" --objective loss ${NUM:+--num "$NUM"}
[ -e samples.safetensors ] || together sample merged.safetensors -n 64 -o samples.safetensors
together eval base.safetensors ft_*.safetensors merged.safetensors ${NUM:+--num "$NUM"}
