"""Stable Diffusion 1.x and 2.x: a U-Net on VAE latents that attends to CLIP's text tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import TOKENS, Backbone, Config, Tables
from deme_cli.diffusion.conditions import Conditions


class StableDiffusion(Backbone):
    """UNet2DConditionModel with one text encoder (Rombach et al. 2022)."""

    class_name, pipeline, part = "UNet2DConditionModel", "StableDiffusionPipeline", "unet"
    parts = ("vae", "text_encoder", "tokenizer")
    wants = "text"
    guidance = 7.5
    settings: ClassVar[Tables] = {
        "finetune": {"batch_size": 16, "accumulation": 16},
        "merge": {"batch_size": 8},
        "sample": {"steps": 25, "batch_size": 8},
    }
    # StableDiffusionPipeline.__init__: as it was trained, whatever a scheduler's file leaves out
    scheduler_changes: ClassVar[Config] = {"steps_offset": 1, "clip_sample": False}

    def matches(self, config: Config) -> bool:
        return super().matches(config) and not config.get("addition_embed_type")

    def refusal(self, config: Config) -> str | None:
        if config.get("class_embed_type") or config.get("encoder_hid_dim_type"):
            return "a UNet2DConditionModel with class or image embeddings; deme takes text alone"
        return super().refusal(config)

    def corrected(self, config: Config) -> Config:
        """With the 64 of all models of 2022, whose files say 32 (StableDiffusionPipeline too)."""
        size = config.get("sample_size")
        is_old = re.match(r"0\.[0-8]\b", str(config.get("_diffusers_version")))
        return (
            {**config, "sample_size": 64} if is_old and type(size) is int and size < 64 else config
        )

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, config["cross_attention_dim"])}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        return network(x_t, t, given["encoder_hidden_states"], return_dict=False)[0]

    def encode(self, pipeline: Any, prompts: Sequence[str], geometry: Tensor) -> Conditions:
        tokens, _ = pipeline.encode_prompt(
            list(prompts), pipeline.text_encoder.device, 1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": tokens}
