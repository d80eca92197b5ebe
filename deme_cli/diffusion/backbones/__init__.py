"""The networks that deme takes, one file each, told apart by their diffusers config here alone."""

from __future__ import annotations

from deme_cli.diffusion.backbones.backbone import Backbone, Config
from deme_cli.diffusion.backbones.dit import DiT
from deme_cli.diffusion.backbones.flux import Flux
from deme_cli.diffusion.backbones.stable_diffusion import StableDiffusion
from deme_cli.diffusion.backbones.stable_diffusion_3 import StableDiffusion3
from deme_cli.diffusion.backbones.stable_diffusion_xl import StableDiffusionXL
from deme_cli.diffusion.backbones.unet import UNet
from deme_cli.diffusion.backbones.wan import Wan
from deme_cli.errors import ArtifactError

KNOWN: tuple[Backbone, ...] = (
    UNet(), StableDiffusion(), StableDiffusionXL(), DiT(), StableDiffusion3(), Flux(), Wan(),
)  # fmt: skip


def backbone_of(model_config: Config, where: str = "the model") -> Backbone:
    """The backbone that a diffusers config describes.

    Raises ArtifactError for networks and variants that deme does not take.
    """
    for backbone in KNOWN:
        if backbone.matches(model_config):
            if reason := backbone.refusal(model_config):
                raise ArtifactError(f"{where}: {reason}")
            return backbone
    names = ", ".join(dict.fromkeys(one.class_name for one in KNOWN))
    raise ArtifactError(
        f"{where}: backbone {model_config.get('_class_name')!r}; deme takes {names}"
    )
