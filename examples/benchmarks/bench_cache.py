"""What cached latents are worth: a Stable-Diffusion-shaped update with a cache, and without.

The networks have the blocks of Stable Diffusion 1.4 at tiny widths. What decides the gain is how
the frozen work compares with the trained one. Of SD 1.4 at 512 x 512 it is counted by torch's
flop_counter on meta tensors: VAE encoder and text encoder of one image, against an update of the
U-Net of four forwards (its own, a backward of twice as much, and the frozen base's for the
consistency loss). That share, 0.352, bounds the gain by 1.352 where all parts run equally fast.
Tiny networks do not: a small U-Net of many small operations takes longer for their number than a
VAE. So the widths are those at which the frozen parts take about SD's share of the *time* of an
update; it is measured and printed beside the operations.

Both train the same expert on the same draws in one process, in turn, several rounds; printed is
seconds uncached / seconds cached per round: median (min to max). 1.3 is the aim.

    OMP_NUM_THREADS=1 uv run --with pytest python examples/benchmarks/bench_cache.py
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import timeit
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from rounds import in_turn, machine, ratios, verdict
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from deme_cli.artifacts import write_artifact
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.checkpoints import import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.timesteps import parse_range
from deme_cli.training.examples import Examples, fill_caches, open_examples
from deme_cli.training.setup import Run
from deme_cli.training.train import train

_UNET = {"sample_size": 64, "attention_head_dim": 8, "layers_per_block": 2}  # diffusers' blocks
_VAE = {
    "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_TOKENS = 77


@dataclass(frozen=True)
class Widths:
    """Channels of a Stable Diffusion, and the pixels per side of its images."""

    unet: int
    vae: int
    text: int
    pixels: int
    groups: tuple[int, int] = (32, 32)  # of the norms of U-Net and VAE

    def unet_config(self) -> dict[str, Any]:
        widths = [self.unet, 2 * self.unet, 4 * self.unet, 4 * self.unet]
        return {
            **_UNET, "sample_size": self.pixels // 8, "block_out_channels": widths,
            "cross_attention_dim": self.text, "norm_num_groups": self.groups[0],
        }  # fmt: skip

    def vae_config(self) -> dict[str, Any]:
        widths = [self.vae, 2 * self.vae, 4 * self.vae, 4 * self.vae]
        return {**_VAE, "block_out_channels": widths, "norm_num_groups": self.groups[1]}

    def text_config(self) -> CLIPTextConfig:
        widths: dict[str, Any] = {
            "hidden_size": self.text, "intermediate_size": 4 * self.text,
            "num_attention_heads": self.text // 64 or 4, "projection_dim": self.text,
        }  # fmt: skip
        return CLIPTextConfig(**widths, **_TEXT)


SD14 = Widths(unet=320, vae=128, text=768, pixels=512)
TINY = Widths(unet=48, vae=20, text=36, pixels=128, groups=(16, 10))


def count(widths: Widths) -> dict[str, float]:
    """Floating-point operations of one image: U-Net forward, VAE encoder, text encoder."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**widths.unet_config())
        vae: Any = AutoencoderKL(**widths.vae_config())
        text = CLIPTextModel(widths.text_config())
        latents = torch.empty(1, 4, widths.pixels // 8, widths.pixels // 8)
        inputs = {
            "unet": (unet, (latents, torch.ones(1), torch.empty(1, _TOKENS, widths.text))),
            "vae": (vae.encode, (torch.empty(1, 3, widths.pixels, widths.pixels),)),
            "text": (text, (torch.zeros(1, _TOKENS, dtype=torch.long),)),
        }
        counted = {}
        for name, (network, arguments) in inputs.items():
            with FlopCounterMode(display=False) as counter:
                network(*arguments)
            counted[name] = counter.get_total_flops()
    return counted


def describe(name: str, widths: Widths) -> str:
    flops = count(widths)
    vae, text = (flops[part] / flops["unet"] for part in ("vae", "text"))
    return (
        f"{name}: U-Net {flops['unet'] / 1e9:.1f} GFLOP, VAE encoder {vae:.3f} of it, "
        f"text encoder {text:.4f}; frozen / update {(vae + text) / 4:.3f}"
    )


def shares(denoiser: Denoiser, examples: Examples, batch_size: int) -> str:
    """Seconds of the parts of an update, the best of several."""
    network = copy.deepcopy(denoiser.network).requires_grad_(True)
    x0, conditions = examples.draw(range(batch_size), flip=None, generator=None)
    t = torch.arange(batch_size)

    def train_forward() -> None:
        predict(network, x0, t, conditions).square().mean().backward()
        network.zero_grad(set_to_none=True)

    def base_forward() -> None:
        with torch.no_grad():
            predict(network, x0, t, conditions)

    def frozen() -> None:
        examples.draw(range(batch_size), flip=None, generator=None)

    trained, base, parts = (
        min(timeit.repeat(each, number=1, repeat=4))
        for each in (train_forward, base_forward, frozen)
    )
    return (
        f"seconds of {batch_size} images: U-Net {trained:.3f}, base {base:.3f}, frozen parts "
        f"{parts:.3f}; frozen / update {parts / (trained + base):.3f}"
    )


def write_pipeline(folder: Path, widths: Widths) -> Path:
    """A random Stable Diffusion of these widths, with CLIP's tokenizer."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from tiny_pipelines import clip_tokenizer

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(**widths.vae_config()), text_encoder=CLIPTextModel(widths.text_config()),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=UNet2DConditionModel(**widths.unet_config()), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def write_images(folder: Path, widths: Widths, num: int) -> Path:
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image = coarse.resize((widths.pixels, widths.pixels), Image.Resampling.BICUBIC)
        image.save(folder / f"{index:03d}.png")
        rows.append({"file_name": f"{index:03d}.png", "text": f"a photo of thing number {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def seconds(run: Run) -> tuple[float, float]:
    """Seconds of a run and its last loss."""
    start = time.perf_counter()
    *_, last = train(run)
    taken = time.perf_counter() - start
    run.output.unlink()
    return taken, last.loss


def prepare(folder: Path, config: FinetuneConfig) -> tuple[Denoiser, dict[str, Examples]]:
    """The base, and its examples with and without a cache; both ready to be drawn from."""
    model = import_model(str(write_pipeline(folder / "pipeline", TINY)))
    write_artifact(folder / "base.safetensors", model.weights, model.record)
    denoiser = load_denoiser(folder / "base.safetensors")
    images = DataConfig(source=str(write_images(folder / "images", TINY, 4 * config.batch_size)))
    companions = open_companions(denoiser.record)
    cached = open_examples(
        images, companions, split="train", flips=True, cache="auto", beside=folder
    )
    fill_caches(cached)
    uncached = open_examples(images, companions, split="train", flips=True)
    uncached.draw([0], flip=None, generator=None)  # loads the frozen parts
    return denoiser, {"cached": cached, "uncached": uncached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    options = parser.parse_args()
    print(machine())
    print(describe("Stable Diffusion 1.4 at 512 x 512", SD14))
    print(describe(f"this benchmark at {TINY.pixels} x {TINY.pixels}", TINY))
    config = FinetuneConfig(
        steps=options.steps, batch_size=options.batch_size, accumulation=options.accumulation,
        held_out=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        denoiser, kinds = prepare(Path(name), config)
        run = Run(
            denoiser=denoiser, choice=parse_range("2/4", 1000), examples=kinds["cached"],
            held_out=None, flip=True, config=config, output=Path(name) / "expert.safetensors",
        )  # fmt: skip
        print(shares(denoiser, kinds["uncached"], config.batch_size))
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        losses = set()
        for counts, kind in in_turn(list(kinds), options.rounds):
            spent, loss = seconds(replace(run, examples=kinds[kind]))
            losses.add(loss)
            if counts:
                taken[kind].append(spent)
        assert max(losses) - min(losses) <= 1e-5 * max(losses), losses
        print("  " + ", ".join(f"{kind} {s:.2f} s" for kind in kinds for s in taken[kind]))
    label = f"{options.steps} updates of {options.accumulation} x {options.batch_size} images"
    quotients = ratios(taken["uncached"], taken["cached"])
    print(verdict(f"{label}: uncached / cached", quotients, ">= 1.3"))


if __name__ == "__main__":
    main()
