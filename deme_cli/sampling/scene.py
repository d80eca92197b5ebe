"""What is drawn: the size of the images, what each of them shows, how strongly it is guided.

A scene belongs to a base and is shared by all that came from it: the frozen parts around the
denoiser are the same. B batch, C channels, h x w pixels of latents, H x W of images; a model that
draws pixels has images for latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import SampleConfig
from deme_cli.data.prompts import PromptSet
from deme_cli.diffusion.backbones.backbone import Shape
from deme_cli.diffusion.companions import GEOMETRY, Companions, open_companions
from deme_cli.diffusion.conditions import Conditions, concatenate, null_like
from deme_cli.diffusion.denoiser import TORCH_DTYPES, Denoiser
from deme_cli.sampling.subjects import choose_subjects


@dataclass(frozen=True)
class Scene:
    """Images 0 .. num - 1: their noise has `latent_shape`, they come out with `image_shape`.

    `guidance` is the scale of classifier-free guidance, None for models drawn from noise alone.
    `prompts` and `classes` hold one per image, where images have them; `card` what else of the
    scene images depend on.
    """

    companions: Companions
    latent_shape: Shape
    num: int
    guidance: float | None = None
    resize: int | None = None
    prompts: list[str] | None = None
    classes: list[int] | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def drawn_shape(self) -> Shape:
        """(C, H, W) of the images as the model draws them."""
        return self.companions.image_shape(self.latent_shape)

    @property
    def image_shape(self) -> Shape:
        """(C, H, W) of the finished images, after `resize`."""
        if self.resize is None:
            return self.drawn_shape
        return self.drawn_shape[0], self.resize, self.resize

    @property
    def resolution(self) -> int | None:
        """Pixels per side as drawn; None for pixels of the size the model was made for."""
        companions = self.companions
        own = companions.backbone.sample_shape(companions.record.model_config)
        if not self.has_latents and self.latent_shape == own:
            return None
        return self.drawn_shape[1]

    @property
    def has_latents(self) -> bool:
        """Whether a VAE turns what is denoised into images."""
        return "vae" in self.companions.backbone.parts

    @property
    def scheduler_changes(self) -> Mapping[str, Any]:
        """What the model's pipeline changes in every scheduler that it is given."""
        return self.companions.backbone.scheduler_changes

    @property
    def subjects(self) -> Sequence[Any] | None:
        """The prompt or class number that the model is told for each image."""
        return {"text": self.prompts, "class": self.classes}.get(self.companions.wants)

    @property
    def told_guidance(self) -> float | None:
        """The scale where it is an input of the network (distilled)."""
        companions = self.companions
        is_input = companions.backbone.embeds_guidance(companions.record.model_config)
        return self.guidance if is_input else None

    @property
    def is_paired(self) -> bool:
        """Whether every forward has the images twice: told nothing, and told their subject."""
        return self.told_guidance is None and self.guidance is not None and self.guidance > 1

    def conditions(self, start: int, stop: int) -> Conditions:
        """What the network is told of images start .. stop - 1, batch B.

        Batch 2B where guidance needs a pair, the null first.
        """
        if self.subjects is None:
            return {}
        _, height, width = self.drawn_shape
        sizes = [height, width, 0, 0, height, width]  # uncropped, as the pipeline says by default
        assert len(sizes) == GEOMETRY
        geometry = torch.tensor([sizes] * (stop - start))
        told = self.companions.conditions(self.subjects[start:stop], geometry)
        if self.told_guidance is not None:
            scale = torch.full((stop - start,), self.told_guidance, dtype=torch.float32)
            told["guidance"] = scale.to(self.companions.device)
        if self.is_paired:
            told = concatenate(null_like(told, self.companions.null()), told)
        return told

    def load(self) -> None:
        """Load the frozen parts, so that wrong ones are told before anything is denoised.

        Raises ArtifactError where they are not those of the base.
        """
        if self.companions.backbone.parts:
            _ = self.companions.pipeline
        if self.companions.wants == "text" and self.prompts:
            self.companions.tell_cut(list(dict.fromkeys(self.prompts)), "prompts")

    def lay_out(self, scheduler: Any, steps: int) -> None:
        """Set the scheduler's timesteps as the model's own pipeline does."""
        self.companions.backbone.lay_out(scheduler, steps, self.latent_shape)


def open_scene(
    records: Sequence[DenoiserRecord],
    config: SampleConfig,
    *,
    prompts: PromptSet | None = None,
    pipeline: str | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Scene:
    """The scene for models of these records, which are of one base.

    prompts: in place of those that `config` names. pipeline: folder or hub id of the frozen parts,
    else where the base came from. Nothing is loaded yet. Raises ConfigError where the settings do
    not fit the model, MissingError where prompts or frozen parts are absent.
    """
    first = records[0]
    companions = open_companions(first, pipeline=pipeline, device=device, dtype=dtype)
    subjects = choose_subjects(companions.wants, companions.num_classes, config, prompts=prompts)
    own = companions.backbone.sample_shape(first.model_config)
    return Scene(
        companions,
        companions.latent_shape(own, config.resolution),
        subjects.num,
        _guidance(companions, config),
        config.resize,
        subjects.prompts,
        subjects.classes,
        subjects.card,
    )


def scene_of(denoiser: Denoiser, config: SampleConfig) -> Scene:
    """The scene of a denoiser that is loaded, with its frozen parts beside it."""
    dtype = next(name for name, kind in TORCH_DTYPES.items() if kind == denoiser.dtype)
    return open_scene([denoiser.record], config, device=str(denoiser.device), dtype=dtype)


def _guidance(companions: Companions, config: SampleConfig) -> float | None:
    """The scale as given, else that of the model's pipeline; 1 for every scale without effect."""
    if companions.wants == "nothing":
        return None
    backbone, model_config = companions.backbone, companions.record.model_config
    scale = config.guidance
    if scale is None:
        scale = backbone.default_guidance(model_config)
    return float(scale) if backbone.embeds_guidance(model_config) else max(1.0, float(scale))
