"""Unconditional U-Nets that draw pixels: DDPM and DDIM pipelines."""

from __future__ import annotations

from torch import Tensor, nn

from deme_cli.diffusion.backbones.backbone import Backbone, Config
from deme_cli.diffusion.conditions import Conditions


class UNet(Backbone):
    """UNet2DModel (Ho et al. 2020)."""

    class_name, pipeline, part = "UNet2DModel", "DDPMPipeline", "unet"
    parts = ()
    wants = "nothing"

    def refusal(self, config: Config) -> str | None:
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            return "class-conditional UNet2DModels are not supported; a DiT is"
        if config.get("in_channels", 3) not in (1, 3):
            return (
                f"{config['in_channels']} channels: deme trains UNet2DModels on grey (1) or colour "
                f"(3) images, and latents only of pipelines with a VAE"
            )
        return super().refusal(config)

    def size_refusal(self, config: Config, side: int) -> str | None:
        step = 2 ** (len(config["block_out_channels"]) - 1)
        return None if side % step == 0 else f"takes multiples of {step}"

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        return network(x_t, t, return_dict=False)[0]
