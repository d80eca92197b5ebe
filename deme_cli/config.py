"""Settings: one frozen dataclass per procedure, its defaults, its checks, and how they are found.

Precedence: command line, then `deme.toml`, then the defaults here, and nowhere else. Each setting
carries the sentence that `--help` and the comments of `deme.toml` show.
"""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.errors import ConfigError
from deme_cli.finetune_config import DIVISIONS, FinetuneConfig
from deme_cli.merge_config import MergeConfig
from deme_cli.settings import Settings, setting
from deme_cli.timesteps import TimestepRange

CONFIG_NAME = "deme.toml"
DTYPES = ("fp32", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
SAMPLERS = ("ddim", "ddpm", "pndm", "dpm++", "euler", "heun", "unipc", "deis", "lms")
SPACINGS = ("leading", "linspace", "trailing")
PROTOCOLS = (
    "ddim-cifar10", "lsun-church-50k", "lsun-bedroom-50k", "bk-sdm-coco30k", "parti", "imagenet",
)  # fmt: skip
RESIZES = ("clean", "legacy_pytorch", "legacy_tensorflow")
CROPS = ("centre", "random")
EVAL_NUM = 50_000  # images of a row where nothing says otherwise
_IMAGES, _SHOWN, _SIZE = "Images and captions", "What is shown", "Size"


@dataclass(frozen=True)
class ModelConfig(Settings):
    """[model]: where the base came from and where its artifact lies."""

    source: str = setting("", "what `deme split` imported")
    base: str = setting("base.safetensors", "the imported base, beside this file")
    pipeline: str | None = setting(
        None,
        "folder or hub id with the VAE and text encoders; unset: where the model came from",
        panel="Common",
    )


@dataclass(frozen=True)
class DataConfig(Settings):
    """[data]: the training images."""

    source: str = setting(
        "", "known name, folder of images, hub dataset id, or samples artifact", flags="--data"
    )
    horizontal_flip: bool | None = setting(
        None,
        "mirror images at random in training; unset: yes, except for digits",
        flags="--flip/--no-flip",
        panel=_IMAGES,
    )
    captions: str | None = setting(
        None,
        "column of the captions or classes; unset: text, caption, prompt, or label",
        panel=_IMAGES,
    )
    crop: str = setting(
        "centre", "what of an image is kept in training", choices=CROPS, panel=_IMAGES
    )
    resolution: int | None = setting(
        None, "pixels per side in training; unset: the size the model was made for", panel=_IMAGES
    )

    def check(self) -> None:
        self._positive("resolution")


@dataclass(frozen=True)
class SplitConfig(Settings):
    """[split]: how [0, T) is divided."""

    n: int = setting(4, "number of timestep ranges, one expert each", flags="-n --num-ranges")
    by: str = setting("uniform", "what the ranges have in common", choices=DIVISIONS)
    ranges: list[str] | None = setting(None, "the ranges themselves, as start:stop")

    def check(self) -> None:
        self._positive("n")

    @property
    def timestep_ranges(self) -> list[TimestepRange]:
        spans = []
        for text in self.ranges or []:
            start, _, stop = text.partition(":")
            if not (start.isdigit() and stop.isdigit()):
                raise ConfigError(f"[split] ranges: {text!r} is not start:stop")
            spans.append(TimestepRange(int(start), int(stop)))
        return spans


@dataclass(frozen=True)
class SampleConfig(Settings):
    """[sample]: how images are drawn."""

    num: int | None = setting(
        None, "number of images; unset: 64, or as many as the prompts make", flags="--num -n"
    )
    sampler: str | None = setting(
        None,
        "diffusers scheduler that denoises; unset: the checkpoint's own, or the next that fits "
        "(ddim for pixels, if trained by ddpm and not all timesteps are steps)",
        choices=SAMPLERS,
    )
    steps: int = setting(50, "denoising steps")
    eta: float = setting(0.0, "noise added by DDIM: 0 none, 1 as much as DDPM")
    spacing: str | None = setting(
        None, "spacing of the steps in [0, T); unset: the checkpoint's own", choices=SPACINGS
    )
    guidance: float | None = setting(
        None, "classifier-free guidance scale, 1 for none; unset: that of the model's pipeline"
    )
    prompts: str | None = setting(
        None,
        "prompts: a file (txt, csv, tsv, json), parti, coco, imagenet, digits, or text:PROMPT",
        panel=_SHOWN,
    )
    prompt_column: str | None = setting(
        None, "column of the prompts in a table; unset: prompt, caption or text", panel=_SHOWN
    )
    classes: str | None = setting(
        None,
        "classes to draw in turn, as 0,3,7 or 0-9; unset: all that the model knows",
        panel=_SHOWN,
    )
    per_prompt: int = setting(1, "images of each prompt", panel=_SHOWN)
    resolution: int | None = setting(
        None, "pixels per side that the model draws; unset: the size it was made for", panel=_SIZE
    )
    resize: int | None = setting(
        None, "pixels per side of the images kept (bicubic)", flags="--resize-to", panel=_SIZE
    )
    batch_size: int = setting(
        256, "images denoised at a time; does not change the images", flags="--batch-size -b"
    )
    seed: int = setting(0, "seed of the noise; image i depends on (seed, i) alone")

    def check(self) -> None:
        self._positive("num", "steps", "batch_size", "per_prompt", "resolution", "resize")
        self._not_negative("eta", "seed", "guidance")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """[eval]: what is measured, against what, on how many images. Sampling follows [sample]."""

    protocol: str | None = setting(
        None, "a published protocol that fixes sampler, counts and extractor", choices=PROTOCOLS
    )
    fid: str | None = setting(
        None,
        "reference of the Fréchet distance: digits, cifar10, a folder, samples, statistics, .npz",
    )
    kid: str | None = setting(None, "reference of the kernel distance: images, as for fid")
    clip_score: bool = setting(False, "measure the CLIP score of prompts and images")
    clip_model: str = setting("ViT-g-14", "architecture of the CLIP score, as open_clip calls it")
    clip_weights: str = setting(
        "laion2b_s34b_b88k", "weights of the CLIP score: a tag of open_clip, a file or local-dir:"
    )
    accuracy: str | None = setting(
        None, "classifier that should recognise the prompted class: digits or a TorchScript file"
    )
    features: str | None = setting(
        None,
        "what a distance is taken on: inception, clip, digits or a TorchScript file; unset: digits "
        "for digits, else inception",
    )
    resize: str = setting("clean", "how images come to the extractor's size", choices=RESIZES)
    num: int | None = setting(
        None,
        f"images per row and repeat; unset: {EVAL_NUM:,}, or as many as the prompts make",
        flags="--num -n",
    )
    repeats: int = setting(1, "independent seeds per row; their mean and sd are shown")
    batch_size: int = setting(128, "images per forward of the extractor", flags="--batch-size -b")
    seed: int = setting(0, "first seed; repeat r uses seed + r")
    mixed: bool = setting(False, "allow rows that were drawn under different protocols")

    def check(self) -> None:
        self._positive("num", "repeats", "batch_size")
        self._not_negative("seed")


TABLES: dict[str, type[Settings]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "split": SplitConfig,
    "finetune": FinetuneConfig,
    "merge": MergeConfig,
    "sample": SampleConfig,
    "eval": EvalConfig,
}
