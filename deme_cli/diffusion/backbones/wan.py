"""Wan 2.1 and 2.2: a flow-matching video transformer, taken as a model of still images.

An image is a video of one frame. Latents are (C, h, w) everywhere outside, as those of the other
backbones; the frame's axis, (C, 1, h, w), is put in before the network and its VAE and taken out
behind them. Videos are neither trained on nor drawn: an expert learns what the base says of single
frames, and what becomes of its motion nobody looks at. Wan 2.2 A14B are two such networks that
divide the timesteps between them, experts already; TI2V-5B (a time for every token) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import Backbone, Config, Shape, Tables
from deme_cli.diffusion.conditions import Conditions
from deme_cli.errors import ArtifactError

_TOKENS = 512  # of a caption in UMT5: `max_sequence_length` of WanPipeline.__call__
# Latent pixels per side, 640 of the image: no config tells a size, and of the squares that the VAE
# and the patches allow this one has nearly as many pixels as the pipeline's 480 x 832.
_SAMPLE_SIZE = 80


class Wan(Backbone):
    """WanTransformer3DModel (Wan Team 2025)."""

    class_name, pipeline, part = "WanTransformer3DModel", "WanPipeline", "transformer"
    parts = ("vae", "text_encoder", "tokenizer")
    wants = "text"
    blocks = ("blocks",)
    guidance = 5.0
    max_tokens: ClassVar[Mapping[str, int]] = {"tokenizer": _TOKENS}
    since = "0.33"
    call = 'pipeline({}, num_frames=1, output_type="pil").frames[0][0]'
    settings: ClassVar[Tables] = {
        "finetune": {"batch_size": 4, "accumulation": 64},
        "merge": {"batch_size": 4},
        "sample": {"steps": 50, "batch_size": 4},
    }

    def refusal(self, config: Config) -> str | None:
        if shown := [name for name in ("image_dim", "added_kv_proj_dim") if config.get(name)]:
            return (
                f"{', '.join(shown)}: an image-to-video or control model; deme takes "
                f"text-to-video models, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )
        if config.get("patch_size", (1,))[0] != 1:
            return f"patches of {config['patch_size'][0]} frames; deme shows it one frame"
        return super().refusal(config)

    def sample_shape(self, config: Config) -> Shape:
        return config["in_channels"], _SAMPLE_SIZE, _SAMPLE_SIZE

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (_TOKENS, config["text_dim"])}

    def size_refusal(self, config: Config, side: int) -> str | None:
        patch = config["patch_size"][1]
        most = config["rope_max_seq_len"] * patch
        if side % patch or side > most:
            return f"takes multiples of {patch} up to {most}"
        return None

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        video = network(
            hidden_states=x_t.unsqueeze(2),  # (B, C, 1, h, w)
            timestep=t.expand(len(x_t)),
            encoder_hidden_states=given["encoder_hidden_states"],
            return_dict=False,
        )[0]
        return video.squeeze(2)

    def encode(self, pipeline: Any, prompts: Sequence[str], geometry: Tensor) -> Conditions:
        told = {"device": pipeline.text_encoder.device, "max_sequence_length": _TOKENS}
        tokens, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **told)
        return {"encoder_hidden_states": tokens}

    def vae_config(self, config: Config) -> Config:
        """AutoencoderKLWan's: every level but the last halves the sides.

        Raises ArtifactError where it is another VAE's.
        """
        for name in ("z_dim", "dim_mult", "latents_mean", "latents_std"):
            if not config.get(name):
                raise ArtifactError(
                    f"a VAE of class {config.get('_class_name')!r} without {name}, where Wan has "
                    f"AutoencoderKLWan; give the model's own pipeline with --pipeline"
                )
        return {
            "latent_channels": config["z_dim"],
            "block_out_channels": config["dim_mult"],
            "latents_mean": config["latents_mean"],
            "latents_std": config["latents_std"],
            "scaling_factor": 1.0,
        }

    def encode_images(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode_images(vae, images.unsqueeze(2))
        return mean.squeeze(2), deviation.squeeze(2)

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        return super().decode(vae, z.unsqueeze(2)).squeeze(2)
