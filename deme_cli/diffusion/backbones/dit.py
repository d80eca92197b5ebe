"""DiT: a transformer on VAE latents, told a class by adaptive layer norms.

The published models predict a variance beside the noise. It is left alone: samplers that learn
no variance do not use it, so neither does the loss, and guidance acts on the noise alone. The null
class is the number of classes (diffusers' DiTPipeline fixes it at 1000, right for ImageNet only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import Backbone, Config, Tables
from deme_cli.diffusion.conditions import Conditions


class DiT(Backbone):
    """DiTTransformer2DModel (Peebles & Xie 2023)."""

    class_name, pipeline, part = "DiTTransformer2DModel", "DiTPipeline", "transformer"
    parts = ("vae",)
    wants = "class"
    blocks = ("transformer_blocks",)
    guidance = 4.0
    settings: ClassVar[Tables] = {"merge": {"batch_size": 32}, "sample": {"batch_size": 32}}

    def matches(self, config: Config) -> bool:
        # the published folders were written when the class was still Transformer2DModel
        names = (self.class_name, "Transformer2DModel")
        norm = config.get("norm_type", "ada_norm_zero")
        return config.get("_class_name") in names and norm == "ada_norm_zero"

    def refusal(self, config: Config) -> str | None:
        channels = config.get("in_channels")
        if config.get("out_channels") not in (None, channels, 2 * (channels or 0)):
            return f"{config.get('out_channels')} output channels for {channels} input channels"
        return None

    def build(self, config: Config) -> nn.Module:
        """The network, its own class dropout off: who is left out is drawn from the run's seed."""
        network: Any = super().build(config)
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        return network

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"class_labels": ()}

    def num_classes(self, config: Config) -> int:
        return config["num_embeds_ada_norm"]

    def size_refusal(self, config: Config, side: int) -> str | None:
        own = config["sample_size"]
        return None if side == own else f"takes {own} alone"

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        output = network(
            x_t, t.expand(len(x_t)), class_labels=given["class_labels"], return_dict=False
        )[0]
        return output[:, : x_t.shape[1]]

    def encode(self, pipeline: Any, prompts: Sequence[int], geometry: Tensor) -> Conditions:
        return {"class_labels": torch.tensor(list(prompts), dtype=torch.long)}

    def null(self, pipeline: Any, config: Config) -> Conditions:
        return {"class_labels": torch.tensor([self.num_classes(config)])}
