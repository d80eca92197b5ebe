"""Settings: one frozen dataclass per procedure, its defaults, its checks, and how they are found.

Precedence: command line, then `deme.toml`, then the defaults here, and nowhere else. Each setting
carries the sentence that `--help` and the comments of `deme.toml` show.
"""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.errors import ConfigError
from deme_cli.merge_config import MergeConfig
from deme_cli.settings import Settings, setting
from deme_cli.timesteps import TimestepRange

CONFIG_NAME = "deme.toml"
DTYPES = ("fp32", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
PROJECTIONS = ("fold", "block", "none")
LR_SCHEDULES = ("constant", "linear", "cosine")
TIMESTEP_DRAWS = ("per-sample", "per-batch")
WEIGHTINGS = (
    "none", "uniform", "snr+1", "truncated-snr", "min-snr", "soft-min-snr", "p2", "uncertainty",
)  # fmt: skip
MULTITASK = ("none", "uw", "nashmtl", "pcgrad")
DIVISIONS = ("uniform", "snr", "log-snr", "gradient")
SAMPLERS = ("ddim", "ddpm", "pndm", "dpm++", "euler", "heun", "unipc", "deis", "lms")
SPACINGS = ("leading", "linspace", "trailing")
PROTOCOLS = (
    "ddim-cifar10", "lsun-church-50k", "lsun-bedroom-50k", "bk-sdm-coco30k", "parti", "imagenet",
)  # fmt: skip
RESIZES = ("clean", "legacy_pytorch", "legacy_tensorflow")
CROPS = ("centre", "random")
NOT_RESULT = ("checkpoint_every", "held_out", "cache")  # of FinetuneConfig: leave the weights alone


@dataclass(frozen=True)
class ModelConfig(Settings):
    """[model]: where the base came from and where its artifact lies."""

    source: str = setting("", "what `deme split` imported")
    base: str = setting("base.safetensors", "the imported base, beside this file")
    pipeline: str | None = setting(
        None, "folder or hub id with the VAE and text encoders; unset: where the model came from"
    )


@dataclass(frozen=True)
class DataConfig(Settings):
    """[data]: the training images."""

    source: str = setting("", "known name, folder of images, hub dataset id, or samples artifact")
    horizontal_flip: bool | None = setting(
        None, "mirror images at random in training; unset: yes, except for digits"
    )
    captions: str | None = setting(
        None, "column of the captions or classes; unset: text, caption, prompt, or label"
    )
    crop: str = setting("centre", "what of an image is kept in training", choices=CROPS)
    resolution: int | None = setting(
        None, "pixels per side in training; unset: the size the model was made for"
    )

    def check(self) -> None:
        self._positive("resolution")


@dataclass(frozen=True)
class SplitConfig(Settings):
    """[split]: how [0, T) is divided."""

    n: int = setting(4, "number of timestep ranges, one expert each")
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
class FinetuneConfig(Settings):
    """[finetune]: what one expert minimises and how (Eq. 3-6, rates of the released recipe)."""

    p: float = setting(0.3, "probability of drawing a timestep from all of [0, T) (Eq. 6)")
    steps: int = setting(20_000, "optimizer updates")
    batch_size: int = setting(64, "images per optimizer update, before accumulation")
    accumulation: int = setting(1, "batches whose gradients make one update")
    lr: float = setting(5e-5, "peak learning rate")
    lr_schedule: str = setting("constant", "learning rate over the run", choices=LR_SCHEDULES)
    warmup: int = setting(0, "updates over which the learning rate rises from 0")
    consistency: float = setting(
        1.0, "weight of the consistency loss against the frozen base (Eq. 4); 0 turns it off"
    )
    projection: str = setting(
        "fold", "placement of the channel-wise projection", choices=PROJECTIONS
    )
    timesteps: str = setting(
        "per-sample",
        "who draws between the range and [0, T): each image, or a whole batch as the official code",
        choices=TIMESTEP_DRAWS,
    )
    antithetic: bool = setting(
        False, "draw timesteps in mirrored pairs t and start + stop - 1 - t, as the official code"
    )
    loss_weighting: str = setting(
        "none",
        "weight of each timestep in the loss: none (as the network's own target has it), uniform "
        "on the noise, a published one, or learned (uncertainty, as EDM2)",
        choices=WEIGHTINGS,
    )
    weighting_gamma: float | None = setting(
        None, "gamma of min-snr, soft-min-snr (unset: 5) and p2 (unset: 1)"
    )
    weighting_k: float = setting(1.0, "k of p2")
    normalise_weighting: bool = setting(
        False, "scale the loss weighting to a mean of 1 over all timesteps"
    )
    multitask: str = setting(
        "none", "how clusters of timesteps share an update (ANT)", choices=MULTITASK
    )
    clusters: int = setting(5, "clusters of timesteps for --multitask")
    cluster_by: str = setting(
        "uniform", "what the timesteps of a cluster have in common", choices=DIVISIONS
    )
    multitask_lr: float = setting(0.025, "learning rate of the task weights of uw")
    multitask_every: int = setting(25, "updates between new task weights of nashmtl")
    ema_decay: float = setting(
        0.9999, "largest decay of the weights' moving average; 0 turns it off"
    )
    ema_lengths: list[float] | None = setting(
        None, "relative lengths of power-function EMAs to write as well, as 0.05,0.1; unset: none"
    )
    weight_decay: float = setting(1e-6, "AdamW weight decay")
    beta1: float = setting(0.95, "AdamW first-moment decay")
    beta2: float = setting(0.999, "AdamW second-moment decay")
    grad_clip: float = setting(1.0, "largest gradient norm; 0 turns clipping off")
    checkpoint_every: int = setting(1000, "updates between checkpoints")
    snapshot_every: int | None = setting(
        None, "updates between experts written on the way, to be merged; unset: none"
    )
    held_out: int = setting(
        512, "held-out draws whose loss is logged at every checkpoint; 0 logs none"
    )
    caption_dropout: float = setting(
        0.1, "share of captions or classes left out, so that guidance keeps working"
    )
    cache: str = setting(
        "auto",
        "latents and text embeddings on disk: auto (beside the base), off, or a folder; "
        "does not change the draws",
    )
    seed: int = setting(0, "seed of data order, timesteps, noise and flips")

    def check(self) -> None:
        for name in ("p", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} = {getattr(self, name)}: expected a probability from 0 to 1"
                )
        self._positive("steps", "batch_size", "accumulation", "lr")
        self._positive("checkpoint_every", "snapshot_every")
        self._not_negative("warmup", "consistency", "weight_decay", "grad_clip", "held_out", "seed")
        for name in ("ema_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected 0 or more, below 1")
        if self.snapshot_every and self.snapshot_every >= self.steps:
            raise ConfigError(
                f"snapshot_every = {self.snapshot_every}: expected fewer than steps = {self.steps}"
            )
        lengths = self.ema_lengths or []
        if len(set(lengths)) < len(lengths) or not all(0 < s < 12**-0.5 for s in lengths):
            raise ConfigError(  # 12^(-1/2) is the length of the plain mean
                f"ema_lengths = {lengths}: expected different numbers above 0, below 0.2886"
            )
        self._check_weighting()

    def _check_weighting(self) -> None:
        """What belongs to a loss weighting or to tasks is refused where it would do nothing."""
        self._positive("weighting_gamma", "weighting_k", "multitask_lr", "multitask_every")
        if self.weighting_gamma and self.loss_weighting not in ("min-snr", "soft-min-snr", "p2"):
            raise ConfigError(
                f"weighting_gamma belongs to min-snr, soft-min-snr and p2, not to "
                f"loss_weighting = {self.loss_weighting!r}"
            )
        if self.weighting_k != 1 and self.loss_weighting != "p2":
            raise ConfigError(f"weighting_k belongs to p2, not to {self.loss_weighting!r}")
        if self.normalise_weighting and self.loss_weighting in ("none", "uncertainty"):
            raise ConfigError(
                f"normalise_weighting: there is no table of weights to scale with "
                f"loss_weighting = {self.loss_weighting!r}"
            )
        if self.multitask == "none":
            return
        if not 2 <= self.clusters <= self.batch_size:
            raise ConfigError(
                f"clusters = {self.clusters}: expected from 2 to batch_size = {self.batch_size}, "
                f"for each cluster has its share of every batch"
            )
        if self.antithetic or self.timesteps != "per-sample":
            raise ConfigError(
                f"multitask = {self.multitask!r} draws timesteps by cluster; "
                f"leave timesteps and antithetic at their defaults"
            )
        if self.loss_weighting == "uncertainty":
            raise ConfigError("multitask and loss_weighting = 'uncertainty' both learn weights")


@dataclass(frozen=True)
class SampleConfig(Settings):
    """[sample]: how images are drawn."""

    num: int | None = setting(None, "number of images; unset: 64, or as many as the prompts make")
    sampler: str | None = setting(
        None,
        "diffusers scheduler that denoises; unset: ddim, or euler for flow models",
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
    )
    prompt_column: str | None = setting(
        None, "column of the prompts in a table; unset: prompt, caption or text"
    )
    classes: str | None = setting(
        None, "classes to draw in turn, as 0,3,7 or 0-9; unset: all that the model knows"
    )
    per_prompt: int = setting(1, "images of each prompt")
    resolution: int | None = setting(
        None, "pixels per side that the model draws; unset: the size it was made for"
    )
    resize: int | None = setting(None, "pixels per side of the images kept (bicubic)")
    batch_size: int = setting(256, "images denoised at a time; does not change the images")
    seed: int = setting(0, "image i depends on (seed, i) alone")

    def check(self) -> None:
        self._positive("num", "steps", "batch_size", "per_prompt", "resolution", "resize")
        self._not_negative("eta", "seed", "guidance")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """[eval]: what is measured, against what, on how many images. Sampling follows [sample]."""

    protocol: str | None = setting(
        None, "a published protocol that fixes sampler, counts and extractor", choices=PROTOCOLS
    )
    fid: str | None = setting(None, "reference of the Fréchet distance")
    kid: str | None = setting(None, "reference of the kernel distance")
    clip_score: bool = setting(False, "measure the CLIP score of prompts and images")
    clip_model: str = setting("ViT-g-14", "open_clip architecture of the CLIP score")
    clip_weights: str = setting(
        "laion2b_s34b_b88k", "open_clip weights of the CLIP score: a tag, a file or local-dir:"
    )
    accuracy: str | None = setting(
        None, "classifier that should recognise the prompted class: digits or a TorchScript file"
    )
    features: str | None = setting(
        None,
        "inception, clip, digits or a TorchScript file; unset: digits for digits, else inception",
    )
    resize: str = setting("clean", "how images come to the extractor's size", choices=RESIZES)
    num: int = setting(50_000, "images per row and repeat")
    repeats: int = setting(1, "independent seeds per row; their mean and sd are shown")
    batch_size: int = setting(128, "images per forward of the extractor")
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
