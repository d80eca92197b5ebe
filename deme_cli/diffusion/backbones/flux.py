"""Flux: a flow-matching transformer on packed latents (2 x 2 latent pixels make one token).

Latents keep their own shape (C, H, W) everywhere outside; they are packed on the way into the
network and unpacked on the way out. The `dev` model is guidance-distilled: the scale is an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import (
    TOKENS,
    Backbone,
    Config,
    Shape,
    Tables,
    config_of,
    dynamic_shift,
)
from deme_cli.diffusion.conditions import Conditions

_SAMPLE_SIZE = 128  # latent pixels per side: FluxPipeline.default_sample_size; not in the config
_TIME_SCALE = 1000  # the network multiplies its timestep by it
TRAINED_GUIDANCE = 3.5  # scale told to a distilled model in training, as in diffusers' scripts


class Flux(Backbone):
    """FluxTransformer2DModel (Black Forest Labs 2024)."""

    class_name, pipeline, part = "FluxTransformer2DModel", "FluxPipeline", "transformer"
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    wants = "text"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    image_output = 1  # of (text tokens, image tokens)
    max_tokens: ClassVar[Mapping[str, int]] = {"tokenizer_2": 512}
    settings: ClassVar[Tables] = {
        "finetune": {"batch_size": 1, "accumulation": 64},
        "merge": {"batch_size": 1},
        "sample": {"steps": 28, "batch_size": 1},
    }

    def sample_shape(self, config: Config) -> Shape:
        return config["in_channels"] // 4, _SAMPLE_SIZE, _SAMPLE_SIZE

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (TOKENS, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def default_guidance(self, config: Config) -> float:
        return 3.5 if self.embeds_guidance(config) else 1.0

    def size_refusal(self, config: Config, side: int) -> str | None:
        return None if side % 2 == 0 else "takes multiples of 2"

    def embeds_guidance(self, config: Config) -> bool:
        return bool(config.get("guidance_embeds"))

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        from diffusers import FluxPipeline

        batch, channels, height, width = x_t.shape
        tokens = given["encoder_hidden_states"]
        guidance = None
        if self.embeds_guidance(config_of(network)):
            told = x_t.new_full((batch,), TRAINED_GUIDANCE, dtype=torch.float32)
            guidance = given.get("guidance", told)
        output = network(
            hidden_states=FluxPipeline._pack_latents(x_t, batch, channels, height, width),
            timestep=t.expand(batch).to(x_t.dtype) / _TIME_SCALE,
            guidance=guidance,
            pooled_projections=given["pooled_projections"],
            encoder_hidden_states=tokens,
            txt_ids=tokens.new_zeros(tokens.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, x_t.device, x_t.dtype
            ),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(output, height, width, vae_scale_factor=1)

    def encode(self, pipeline: Any, prompts: Sequence[str], geometry: Tensor) -> Conditions:
        tokens, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, device=pipeline.text_encoder.device
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def lay_out(self, scheduler: Any, steps: int, shape: Shape) -> None:
        told: dict[str, Any] = dynamic_shift(scheduler, shape[1] * shape[2] // 4)
        if not scheduler.config.get("use_flow_sigmas"):
            told["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, **told)
