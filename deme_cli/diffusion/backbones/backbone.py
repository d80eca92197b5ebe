"""What the rest of the program may ask of a network, whichever it is.

B batch, C channels, H x W pixels (of latents where there is a VAE). To add a backbone, write a file
beside this one and name it in `__init__.py`: nothing else asks which network it has. Its file says
what is particular to it; what most networks share stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deme_cli.diffusion.conditions import Conditions
from deme_cli.errors import MissingError

Config = Mapping[str, Any]
Shape = tuple[int, int, int]  # (C, H, W)
Tables = Mapping[str, Mapping[str, Any]]  # settings by table of deme.toml
TOKENS = 77  # of a caption in CLIP's text encoders


class Backbone(ABC):
    """A network class of diffusers, and the pipeline that draws with it."""

    class_name: str  # of the network
    pipeline: str  # diffusers' pipeline class
    part: str  # the network's name in the pipeline: unet or transformer
    parts: tuple[str, ...]  # the frozen parts it cannot do without; () for pixels from noise alone
    wants: str  # what an image is drawn from, besides noise: nothing, class or text
    max_tokens: ClassVar[Mapping[str, int]] = {}  # where the pipeline cuts before the tokenizer
    settings: ClassVar[Tables] = {}  # what `split` writes into deme.toml, by table
    scheduler_changes: ClassVar[Config] = {}  # by the pipeline, of whatever scheduler it is given
    guidance: float = 1.0  # the pipeline's own scale of classifier-free guidance; 1 for none
    blocks: tuple[str, ...] = ()  # a transformer's lists of blocks; () for a U-Net's own
    image_output: int = 0  # the place of the image tokens in what a transformer's block gives
    since: str = "0.32"  # the oldest diffusers that has the network
    call: str = "pipeline({}).images[0]"  # how the pipeline is asked for an image

    @property
    def network_class(self) -> Any:
        """The network's class in diffusers. Raises MissingError where that is too old for it."""
        import diffusers

        found = getattr(diffusers, self.class_name, None)
        if found is None:
            raise MissingError(
                f"diffusers {diffusers.__version__} has no {self.class_name}, which came with "
                f"{self.since}: pip install --upgrade diffusers"
            )
        return found

    def matches(self, config: Config) -> bool:
        """Whether a diffusers config describes this network."""
        return config.get("_class_name") == self.class_name

    def refusal(self, config: Config) -> str | None:
        """Why deme does not take this variant, or None."""
        given, channels = config.get("in_channels"), config.get("out_channels")
        if self.part == "unet" and not config.get("sample_size"):
            return "the model config lacks sample_size"
        if channels not in (None, given):
            return (
                f"{given} input channels for {channels} output channels: an inpainting, fill, "
                f"control or image-to-video model, or one of learned variances; deme takes models "
                f"that draw from noise, and text or classes"
            )
        if config.get("time_cond_proj_dim"):
            return "a guidance-distilled (LCM) UNet; deme takes the model it was distilled from"
        return None

    def build(self, config: Config) -> nn.Module:
        """A network with random weights. Raises what diffusers raises on an unusable config."""
        return self.network_class.from_config({**config, "_class_name": self.class_name})

    def corrected(self, config: Config) -> Config:
        """A config as it came, as the pipeline corrects it."""
        return config

    def sample_shape(self, config: Config) -> Shape:
        """(C, H, W) of x_t at the size the model was made for."""
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["in_channels"], height, width

    def condition_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """The shape of each condition, by keyword, without its batch; () for a class number."""
        return {}

    def num_classes(self, config: Config) -> int | None:
        """Classes of a class-conditional model."""
        return None

    def default_guidance(self, config: Config) -> float:
        """The pipeline's scale of classifier-free guidance for a variant of the network."""
        return self.guidance

    def size_refusal(self, config: Config, side: int) -> str | None:
        """Why x_t cannot be `side` pixels wide and high, or None."""
        return None

    def embeds_guidance(self, config: Config) -> bool:
        """Whether guidance is an input of the network (distilled), not a second prediction."""
        return False

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, given: Conditions) -> Tensor:
        """The prediction at (x_t, t).  x_t: (B, C, H, W)   t: (B,) or ()   ->   (B, C, H, W)"""

    def encode(self, pipeline: Any, prompts: Sequence[Any], geometry: Tensor) -> Conditions:
        """Conditions of captions or class numbers, by the frozen parts of `pipeline`.

        geometry: (B, 6) original height, width, crop top, left, target height, width in pixels.
        """
        return {}

    def null(self, pipeline: Any, config: Config) -> Conditions:
        """The condition of nothing said, of batch 1."""
        return self.encode(pipeline, [""], Tensor())

    def vae_config(self, config: Config) -> Config:
        """The VAE's config in AutoencoderKL's words."""
        return config

    def encode_images(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior.  (B, 3, H, W)   ->   (B, C, h, w) each"""
        posterior = vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        """Images of unscaled latents.  (B, C, h, w)   ->   (B, 3, H, W)"""
        return vae.decode(z, return_dict=False)[0]

    def lay_out(self, scheduler: Any, steps: int, shape: Shape) -> None:
        """Set the scheduler's timesteps as the pipeline does for x_t of `shape`."""
        scheduler.set_timesteps(steps)


def config_of(network: nn.Module) -> Config:
    """The diffusers config that a network was built from."""
    from diffusers import ConfigMixin

    assert isinstance(network, ConfigMixin), type(network).__name__
    return network.config


def dynamic_shift(scheduler: Any, num_tokens: int) -> dict[str, float]:
    """{mu} of a flow scheduler whose config asks for one: the larger the image, the more noise."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5,
                "max_shift": 1.15}  # fmt: skip
    told = [config.get(name, default) for name, default in defaults.items()]
    return {"mu": calculate_shift(num_tokens, *told)}
