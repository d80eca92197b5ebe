#!/usr/bin/env bash
# DeMe on CIFAR-10 with the published DDPM (35.7 M parameters), on one GPU.
# Needs the hub (google/ddpm-cifar10-32, uoft-cs/cifar10) and clean-fid's Inception: `deme doctor`
# lists what is there. The paper trains 20,000 updates for each of 4 ranges; STEPS shortens a trial.
# Usage: STEPS=20000 examples/cifar10.sh [FOLDER]
set -euo pipefail
mkdir -p "${1:-cifar10-run}" && cd "${1:-cifar10-run}"
STEPS=${STEPS:-20000}

deme split google/ddpm-cifar10-32 --data cifar10 -n 4
for i in 1 2 3 4; do
  deme finetune --range $i/4 --p 0.3 --steps "$STEPS" --batch-size 64 --accumulation 2 --dtype bf16
done
deme merge ft_*.safetensors --search cmaes --per block --objective fid@1k:16,fid@5k
deme eval base.safetensors ft_*.safetensors merged.safetensors --fid cifar10 \
     --num 50000 --sampler ddim --steps 100 --seed 1
