#!/usr/bin/env bash
# Text-to-image in small: digits drawn from prompts ("a seven"), half an hour on two CPU cores,
# nothing downloaded. A Stable Diffusion of its own making: VAE trained here, U-Net trained by deme,
# then four experts, their merge, and how many prompted digits a classifier recognises.
# Usage: examples/digits_text/run.sh [FOLDER]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "${1:-digits-text-run}" && cd "${1:-digits-text-run}"

python "$here/make_pipeline.py" pipeline                # VAE, text encoder, tokenizer
deme finetune --from-scratch "$here/unet.toml" --pipeline pipeline --data digits \
     --steps 12000 --batch-size 128 --lr 2e-3 --lr-schedule cosine --warmup 50 \
     --ema-decay 0.999 -o start.safetensors
deme split start.safetensors --data digits -n 4         # base.safetensors, deme.toml
cp "$here/deme.toml" .                                  # settings for a model this small
deme finetune --range all --jobs 2                      # ft_1of4.safetensors ... ft_4of4.safetensors
deme finetune --range 1/1 --p 0 --projection none --steps 8000 \
     -o control.safetensors                             # plain finetuning, the same total updates
deme merge ft_*.safetensors --search grid               # merged.safetensors, by distance
deme eval base.safetensors control.safetensors ft_*.safetensors merged.safetensors
for model in base control merged; do                    # base-samples.safetensors, ...
  deme sample $model.safetensors -n 2000
done
deme ensemble-sample ft_*.safetensors -n 2000 -o ensemble-samples.safetensors
python "$here/accuracy.py" ./*-samples.safetensors      # how many show the digit asked for
deme sample merged.safetensors -n 100 -o grid.safetensors  # a grid of prompted digits
deme export merged.safetensors merged-pipeline          # StableDiffusionPipeline.from_pretrained
