"""SD3 and SD3.5: a flow-matching transformer with joint attention; two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import (
    TOKENS,
    Backbone,
    Config,
    Shape,
    Tables,
    dynamic_shift,
)
from deme_cli.diffusion.conditions import Conditions


class StableDiffusion3(Backbone):
    """SD3Transformer2DModel (Esser et al. 2024). T5 may be left out of the pipeline."""

    class_name, pipeline, part = "SD3Transformer2DModel", "StableDiffusion3Pipeline", "transformer"
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    wants = "text"
    blocks, image_output = ("transformer_blocks",), 1  # of (text tokens, image tokens)
    guidance = 7.0
    max_tokens: ClassVar[Mapping[str, int]] = {"tokenizer_3": 256}
    settings: ClassVar[Tables] = {
        "finetune": {"batch_size": 4, "accumulation": 64},
        "merge": {"batch_size": 4},
        "sample": {"steps": 28, "batch_size": 4},
    }

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (TOKENS, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def size_refusal(self, config: Config, side: int) -> str | None:
        patch, most = config["patch_size"], config["pos_embed_max_size"] * config["patch_size"]
        if side % patch or side > most:
            return f"takes multiples of {patch} up to {most}"
        return None

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        times = t.expand(len(x_t))
        return network(hidden_states=x_t, timestep=times, return_dict=False, **given)[0]

    def encode(self, pipeline: Any, prompts: Sequence[str], geometry: Tensor) -> Conditions:
        device = pipeline.text_encoder.device
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def lay_out(self, scheduler: Any, steps: int, shape: Shape) -> None:
        # patches of 2 x 2 latents, as in every published SD3
        scheduler.set_timesteps(steps, **dynamic_shift(scheduler, shape[1] * shape[2] // 4))
