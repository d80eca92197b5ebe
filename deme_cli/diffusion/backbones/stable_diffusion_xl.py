"""SDXL: two text encoders; a pooled embedding and the image's sizes are added to the timestep's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import TOKENS, Backbone, Config, Tables
from deme_cli.diffusion.conditions import Conditions

_REFINER = 1280 + 5 * 256  # its pooled text and 5 numbers, one of them the aesthetic score


class StableDiffusionXL(Backbone):
    """UNet2DConditionModel with `text_time` conditions (Podell et al. 2023)."""

    class_name, pipeline, part = "UNet2DConditionModel", "StableDiffusionXLPipeline", "unet"
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    wants = "text"
    guidance = 5.0
    settings: ClassVar[Tables] = {
        "finetune": {"batch_size": 4, "accumulation": 64},
        "merge": {"batch_size": 4},
        "sample": {"batch_size": 4},
    }

    def matches(self, config: Config) -> bool:
        return super().matches(config) and config.get("addition_embed_type") == "text_time"

    def refusal(self, config: Config) -> str | None:
        if config.get("projection_class_embeddings_input_dim") == _REFINER:
            return "the SDXL refiner, which goes on from another's image; deme takes the base"
        return super().refusal(config)

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        sizes = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        tokens = (TOKENS, config["cross_attention_dim"])
        return {"encoder_hidden_states": tokens, "text_embeds": (pooled,), "time_ids": (6,)}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
        tokens = given["encoder_hidden_states"]
        return network(x_t, t, tokens, added_cond_kwargs=added, return_dict=False)[0]

    def encode(self, pipeline: Any, prompts: Sequence[str], geometry: Tensor) -> Conditions:
        device = pipeline.text_encoder.device
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        sizes = geometry.to(tokens.device, tokens.dtype)
        return {"encoder_hidden_states": tokens, "text_embeds": pooled, "time_ids": sizes}

    def null(self, pipeline: Any, config: Config) -> Conditions:
        """Zeros where the pipeline forces them for an empty prompt; the sizes stay."""
        silent = super().null(pipeline, config)
        del silent["time_ids"]
        if pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in silent.items()}
        return silent
