"""Make the frozen parts of a small Stable Diffusion for the digits: VAE, text encoder, tokenizer.

    python make_pipeline.py PIPELINE [--steps 3000]

The VAE (8x8 images to 4x4 latents) is trained here on the training digits, by mean squared error
with a slight pull towards a standard normal; two minutes on one CPU core. The text encoder is a
small CLIP with random weights, frozen: ten captions only need ten different embeddings. The
tokenizer is CLIP's, from the vocabulary that comes with open_clip. The U-Net has random weights;
`deme finetune --from-scratch` trains it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from deme_cli.data.images import open_images, to_unit

WIDTH = 32  # of the text embeddings


def train_vae(steps: int) -> AutoencoderKL:
    """A VAE of the training digits; prints its error on the test digits."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=8, norm_num_groups=8,
        block_out_channels=[32, 32], layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    images = to_unit(open_images("digits", shape=(3, 8, 8), split="train").batch(range(1438)))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        x = images[torch.randint(len(images), (64,))]
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.sample()).sample - x).square().mean()
        loss = loss + 1e-3 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z = vae.encode(images).latent_dist.sample()
        vae.register_to_config(scaling_factor=float(1 / z.std()))  # latents of deviation 1
        held_out = open_images("digits", shape=(3, 8, 8), split="held-out")
        x = to_unit(held_out.batch(range(len(held_out))))
        error = (vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean()
    print(f"VAE: mean squared error {error:.4f} on the test digits (pixels in [-1, 1])")
    return vae.eval()


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from the vocabulary that ships with open_clip."""
    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=[16, 32],
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=WIDTH, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=train_vae(options.steps), text_encoder=text_encoder(), unet=unet, scheduler=scheduler,
        tokenizer=clip_tokenizer(options.pipeline / "tokenizer"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(options.pipeline)
    print(f"{options.pipeline}: U-Net {sum(p.numel() for p in unet.parameters()):,} parameters")


if __name__ == "__main__":
    main()
