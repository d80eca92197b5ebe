"""What images show: their prompts or classes, their size, and how strongly they are guided.

Text-to-image models draw prompts, class models the classes in turn, unconditional models neither.
A conditioning belongs to a base and is shared by all that came from it: the frozen parts around the
denoiser are the same. B batch, C channels, h x w pixels of latents, H x W of images; a model that
draws pixels has images for latents.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deme_cli.artifacts import DenoiserRecord, ExpertRecord
from deme_cli.config import SampleConfig
from deme_cli.data.prompts import PromptSet, read_prompts, select_prompts
from deme_cli.diffusion.backbones.backbone import Shape
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.conditions import Conditions, concatenate, null_like
from deme_cli.diffusion.denoiser import TORCH_DTYPES, Denoiser
from deme_cli.diffusion.schedule import FLOW, flow_config
from deme_cli.errors import ConfigError
from deme_cli.sampling.scheduler import build_scheduler, name_sampler

DEFAULT_NUM = 64  # images, where neither -n nor prompts say how many
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Conditioning:
    """Images 0 .. num - 1: their noise has `latent_shape`, the model draws `drawn_shape`.

    `guidance` is the scale of classifier-free guidance, None for models drawn from noise alone;
    with `embeds_guidance` it is an input of the network (distilled). `prompts` and `classes` hold
    one per image, where images have them; `card` says where they are from.
    """

    companions: Companions
    latent_shape: Shape
    drawn_shape: Shape
    guidance: float | None
    embeds_guidance: bool
    resize: int | None
    num: int
    prompts: list[str] | None
    classes: list[int] | None
    card: dict[str, Any]

    @property
    def image_shape(self) -> Shape:
        """(C, H, W) of the finished images, after `resize`."""
        channels, height, width = self.drawn_shape
        return channels, self.resize or height, self.resize or width

    @property
    def has_latents(self) -> bool:
        """Whether a VAE turns what is denoised into images."""
        return "vae" in self.companions.backbone.parts

    @property
    def is_paired(self) -> bool:
        """Whether every forward has the images twice: with the null, and with their conditions."""
        return not self.embeds_guidance and self.guidance is not None and self.guidance > 1

    def scheduler(self, record: DenoiserRecord, config: SampleConfig) -> Any:
        """The sampler of a model of this base, laid out as the model's own pipeline does.

        Raises ConfigError if it does not fit the model.
        """
        backbone = self.companions.backbone
        return build_scheduler(
            record.scheduler_config, config, changes=backbone.scheduler_changes,
            lay_out=lambda own, steps: backbone.lay_out(own, steps, self.latent_shape),
        )  # fmt: skip

    def conditions(self, start: int, stop: int) -> Conditions:
        """What the network is told of images start .. stop - 1, batch B.

        Batch 2B where guidance needs a pair, the null first.
        """
        named: Sequence[Any] | None
        named = {"text": self.prompts, "class": self.classes}.get(self.companions.wants)
        if named is None:
            return {}
        _, height, width = self.drawn_shape
        sizes = [height, width, 0, 0, height, width]  # uncropped, as the pipeline says by default
        conditions = self.companions.conditions(
            named[start:stop], torch.tensor([sizes] * (stop - start))
        )
        if self.embeds_guidance and self.guidance is not None:
            scale = torch.full((stop - start,), self.guidance, dtype=torch.float32)
            conditions["guidance"] = scale.to(self.companions.device)
        if self.is_paired:
            conditions = concatenate(null_like(conditions, self.companions.null()), conditions)
        return conditions

    def load(self) -> None:
        """Load the frozen parts, so that wrong ones are told before anything is denoised.

        Raises ArtifactError where they are not those of the base.
        """
        if self.companions.backbone.parts:
            _ = self.companions.pipeline
        if self.companions.wants == "text" and self.prompts:
            self.companions.tell_cut(list(dict.fromkeys(self.prompts)), "prompts")


def open_conditioning(
    record: DenoiserRecord,
    config: SampleConfig,
    *,
    prompts: PromptSet | None = None,
    pipeline: str | None = None, device: str = "cpu", dtype: str = "fp32",
) -> Conditioning:  # fmt: skip
    """What images of a model show, and of all models of its base.

    prompts: in place of those that `config` names. pipeline: folder or hub id of the frozen parts,
    else where the base came from. Nothing is loaded yet. guidance: as given, else that of the
    model's pipeline, and 1 for every scale without effect. Raises ConfigError where the settings do
    not fit the model, MissingError where prompts or frozen parts are absent.
    """
    companions = open_companions(record, pipeline=pipeline, device=device, dtype=dtype)
    backbone, model_config = companions.backbone, record.model_config
    shown = choose_shown(companions.wants, companions.num_classes, config, prompts)
    shape = companions.latent_shape(backbone.sample_shape(model_config), config.resolution)
    embeds, guidance = backbone.embeds_guidance(model_config), None
    if companions.wants != "nothing":
        own = backbone.default_guidance(model_config)
        guidance = float(own if config.guidance is None else config.guidance)
        guidance = guidance if embeds else max(1.0, guidance)
    drawn = companions.image_shape(shape)
    return Conditioning(companions, shape, drawn, guidance, embeds, config.resize, *shown)


def conditioning_of(denoiser: Denoiser, config: SampleConfig) -> Conditioning:
    """That of a denoiser which is loaded, with its frozen parts beside it."""
    dtype = next(name for name, kind in TORCH_DTYPES.items() if kind == denoiser.dtype)
    return open_conditioning(denoiser.record, config, device=str(denoiser.device), dtype=dtype)


def choose_shown(
    wants: str, num_classes: int | None, config: SampleConfig, known: PromptSet | None = None
) -> tuple[int, list[str] | None, list[int] | None, dict[str, Any]]:
    """What `config` names, for a model that wants `nothing`, a `class` or a `text`.

    The number of images, the prompt and the class of each, and the fields of their protocol card.
    known: prompts in place of those that `config` names, for text models.
    Raises ConfigError for settings that such a model cannot follow, and what `read_prompts` raises.
    """
    num = DEFAULT_NUM if config.num is None else config.num
    if wants == "class":
        assert num_classes is not None
        _refuse(config, "this model draws classes, not prompts", "prompts", "prompt_column")
        text = (config.classes or f"0-{num_classes - 1}").replace(" ", "")
        turn = parse_classes(text, num_classes)
        return num, None, [turn[index % len(turn)] for index in range(num)], {"classes": text}
    if wants == "nothing":
        reason = "this model draws from noise alone"
        _refuse(config, reason, "prompts", "classes", "prompt_column")
        if config.guidance not in (None, 1):
            raise ConfigError(
                f"guidance = {config.guidance:g}: {reason}, so there is nothing to guide it by; "
                f"leave guidance out"
            )
        return num, None, None, {}
    _refuse(config, "this model draws prompts, not classes", "classes")
    if known is None:
        if not config.prompts:
            raise ConfigError(
                "this model draws prompts: give them with --prompts FILE (txt, csv, tsv or json), "
                "--prompts parti, coco, imagenet or digits, or one with --prompt TEXT"
            )
        known = read_prompts(config.prompts, column=config.prompt_column)
    chosen = select_prompts(known, num=config.num, per_prompt=config.per_prompt)
    classes = [number for _, number in chosen if number is not None]
    source = {
        "source": known.source, "column": config.prompt_column, "n": len(known),
        "template": known.template,
    }  # fmt: skip
    card = {"prompts": source, "prompts_sha256": known.sha256, "per_prompt": config.per_prompt}
    return len(chosen), [prompt for prompt, _ in chosen], classes or None, card


def _refuse(config: SampleConfig, reason: str, *names: str) -> None:
    """Raise ConfigError if one of these settings is given."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            raise ConfigError(f"{name} = {value!r}: {reason}; leave {name} out")
    if "prompts" in names and config.per_prompt != 1:
        raise ConfigError(f"per_prompt = {config.per_prompt}: {reason}; leave per_prompt out")


def parse_classes(text: str, num_classes: int) -> list[int]:
    """`0,3,7` or `0-9` as class numbers, in the order given, each below `num_classes`."""
    classes: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"classes {text!r}: expected numbers, as in 0,3,7 or 0-9")
        if last >= num_classes:
            raise ConfigError(
                f"classes {text!r}: class {last} is not among the {num_classes} classes of this "
                f"model, 0 to {num_classes - 1}"
            )
        classes += range(first, last + 1)
    return classes


def protocol_card(
    records: Sequence[DenoiserRecord],
    config: SampleConfig,
    *,
    conditioning: Conditioning | None = None,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Everything that images depend on, so that two figures can be compared.

    It goes into the `samples` artifact and under every distance that `deme eval` prints: how, by
    which model and from which seed images are drawn; None where a field has no meaning. Batch size
    and device are not in it, on which images do not depend beyond rounding.
    records: of one model, which then denoises all of [0, T), or of the experts of an ensemble in
    order of their ranges. Without a conditioning, `config` and the first record make it. Raises
    ConfigError if the sampler does not fit the model.
    """
    first = records[0]
    about = conditioning or open_conditioning(first, config)
    config = name_sampler(first, config)
    scheduler = about.scheduler(first, config)
    flow = flow_config(first.scheduler_config)
    horizon, (_, side, _) = first.num_train_timesteps, about.drawn_shape
    ranges = [[0, horizon]]
    if len(records) > 1:
        ranges = [list(record.range) for record in records if isinstance(record, ExpertRecord)]
    is_usual = about.latent_shape == about.companions.backbone.sample_shape(first.model_config)
    can_clip = "clip_sample" in inspect.signature(type(scheduler)).parameters
    return {
        "model": "ensemble" if len(records) > 1 else first.kind,
        "source": first.source,
        "fingerprints": [record.fingerprint for record in records],
        "companions": first.companions or None,
        "ranges": ranges,
        "num_train_timesteps": horizon,
        "prediction_type": FLOW if flow else scheduler.config.prediction_type,
        "sampler": config.sampler,
        "steps": config.steps,
        "forwards": len(scheduler.timesteps) * (2 if about.is_paired else 1),
        "spacing": None if flow else scheduler.config.timestep_spacing,
        "eta": config.eta if config.sampler == "ddim" else None,
        "clip_sample": scheduler.config.clip_sample if can_clip else None,
        "guidance": about.guidance,
        **dict.fromkeys(("prompts", "prompts_sha256", "per_prompt", "classes")),
        **about.card,
        "resolution": side if about.has_latents or not is_usual else None,
        "resize_to": about.resize,
        "dtype": dtype,
        "seed": config.seed,
        "num": about.num,
    }
