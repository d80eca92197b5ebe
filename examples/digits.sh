#!/usr/bin/env bash
# The whole pipeline on the embedded digits, a few minutes on two CPU cores. Nothing is downloaded.
# Usage: examples/digits.sh [FOLDER]
set -euo pipefail
mkdir -p "${1:-digits-run}" && cd "${1:-digits-run}"

# deme.toml has settings for a small model: lr 2e-3 and no consistency loss. For the paper's method
# add --consistency 1 (and --lr 5e-5) to the finetuning of the experts; README has the figures of both.
deme split digits -n 4                                # base.safetensors, deme.toml
deme finetune --range all --jobs 2                    # ft_1of4.safetensors ... ft_4of4.safetensors
deme finetune --range 1/1 --p 0 --consistency 0 --projection none --steps 1600 \
     -o control.safetensors                           # plain finetuning, the same total updates
deme task-vector ft_*.safetensors                     # how far each expert moved, and which way
deme merge ft_*.safetensors --search grid --objective fid
deme eval base.safetensors control.safetensors ft_*.safetensors merged.safetensors \
     --fid digits --repeats 3                         # the experts make one row, the ensemble
deme sample merged.safetensors -n 64                  # merged-samples.safetensors and a PNG
deme export merged.safetensors merged-pipeline        # for diffusers
