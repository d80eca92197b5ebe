"""Settings: one frozen dataclass per table of deme.toml, with its defaults and its checks.

Precedence: command line, then `deme.toml`, then the defaults here, and nowhere else. Each setting
carries the sentence that `--help` and the comments of `deme.toml` show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deme_cli.errors import ConfigError
from deme_cli.settings import Settings, parse_lists, parse_numbers, setting
from deme_cli.successive_halving import parse_stages
from deme_cli.timesteps import TimestepRange, parse_span

AFFINITY_NAME = "gradients.json"  # what gradients are written to, by which a split may cluster
PROJECTIONS = ("fold", "block", "none")
LR_SCHEDULES = ("constant", "linear", "cosine")
TIMESTEP_DRAWS = ("per-sample", "per-batch")
WEIGHTINGS = (
    "none", "uniform", "snr+1", "truncated-snr", "min-snr", "soft-min-snr", "p2", "uncertainty",
)  # fmt: skip
MULTITASK = ("none", "uw", "nashmtl", "pcgrad")
DIVISIONS = ("uniform", "snr", "log-snr", "gradient")
NOT_RESULT = (  # of FinetuneConfig: they leave the weights alone, but for rounding
    "checkpoint_every", "held_out", "cache", "gradient_checkpointing", "micro_batch",
)  # fmt: skip
_RATE, _WEIGHTS, _MEMORY, _MORE = "Optimisation", "Weights of timesteps", "Memory", "More"
_IMAGES = "Images and captions"


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """[finetune]: what one expert minimises and how (Eq. 3-6, rates of the released recipe)."""

    p: float = setting(0.3, "probability of drawing a timestep from all of [0, T) (Eq. 6)")
    steps: int = setting(20_000, "optimizer updates")
    batch_size: int = setting(
        64, "images per optimizer update, before accumulation", flags="--batch-size -b", panel=_RATE
    )
    accumulation: int = setting(1, "batches whose gradients make one update", panel=_RATE)
    lr: float = setting(5e-5, "peak learning rate", panel=_RATE)
    lr_schedule: str = setting(
        "constant", "learning rate over the run", choices=LR_SCHEDULES, panel=_RATE
    )
    warmup: int = setting(0, "updates over which the learning rate rises from 0", panel=_RATE)
    consistency: float = setting(
        1.0, "weight of the consistency loss against the frozen base (Eq. 4); 0 turns it off"
    )
    projection: str = setting(
        "fold", "placement of the channel-wise projection", choices=PROJECTIONS
    )
    timesteps: str = setting(
        "per-sample",
        "what p is drawn for: every image, or a whole batch at once as in the official code",
        choices=TIMESTEP_DRAWS,
        panel=_MORE,
    )
    antithetic: bool = setting(
        False,
        "draw timesteps in mirrored pairs t and start + stop - 1 - t, as in the official code",
        flags="--antithetic/--independent",
        panel=_MORE,
    )
    loss_weighting: str = setting(
        "none",
        "weight of each timestep in the loss: none (as the network's own target has it), uniform "
        "on the noise, a published one, or learned (uncertainty, as EDM2)",
        choices=WEIGHTINGS,
        panel=_WEIGHTS,
    )
    weighting_gamma: float | None = setting(
        None, "gamma of min-snr, soft-min-snr (unset: 5) and p2 (unset: 1)", panel=_WEIGHTS
    )
    weighting_k: float = setting(1.0, "the k of p2", panel=_WEIGHTS)
    normalise_weighting: bool = setting(
        False,
        "scale the loss weighting to a mean of 1 over all timesteps",
        flags="--normalise-weighting/--raw-weighting",
        panel=_WEIGHTS,
    )
    multitask: str = setting(
        "none", "how clusters of timesteps share an update (ANT)", choices=MULTITASK, panel=_WEIGHTS
    )
    clusters: int = setting(5, "clusters of timesteps for --multitask", panel=_WEIGHTS)
    cluster_by: str = setting(
        "uniform",
        "what the timesteps of a cluster have in common",
        choices=DIVISIONS,
        panel=_WEIGHTS,
    )
    multitask_lr: float = setting(0.025, "learning rate of the task weights of uw", panel=_WEIGHTS)
    multitask_every: int = setting(
        25, "updates between new task weights of nashmtl", panel=_WEIGHTS
    )
    ema_decay: float = setting(
        0.9999, "largest decay of the weights' moving average; 0 turns it off", panel=_RATE
    )
    ema_lengths: list[float] | None = setting(
        None,
        "relative lengths of power-function EMAs to write as well, as 0.05,0.1; unset: none",
        panel=_RATE,
        parse=parse_numbers,
    )
    weight_decay: float = setting(1e-6, "AdamW weight decay", panel=_RATE)
    beta1: float = setting(0.95, "AdamW first-moment decay", panel=_RATE)
    beta2: float = setting(0.999, "AdamW second-moment decay", panel=_RATE)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 turns clipping off", panel=_RATE)
    checkpoint_every: int = setting(1000, "updates between checkpoints", panel=_MORE)
    snapshot_every: int | None = setting(
        None, "updates between experts written on the way, to be merged; unset: none", panel=_MORE
    )
    held_out: int = setting(
        512, "held-out draws whose loss is logged at every checkpoint; 0 logs none", panel=_MORE
    )
    caption_dropout: float = setting(
        0.1, "share of captions or classes left out, so that guidance keeps working", panel=_IMAGES
    )
    cache: str = setting(
        "auto",
        "latents and text embeddings on disk: auto (beside the base), off, or a folder; "
        "does not change the draws",
        panel=_IMAGES,
    )
    gradient_checkpointing: bool = setting(
        False,
        "compute activations again in the backward pass: less memory, a third more time; "
        "changes rounding alone",
        flags="--gradient-checkpointing/--keep-activations",
        panel=_MEMORY,
    )
    micro_batch: int | None = setting(
        None,
        "images per forward and backward; changes rounding alone; unset: the whole batch. "
        "Halved where a GPU's memory runs out",
        panel=_MEMORY,
    )
    seed: int = setting(0, "seed of data order, timesteps, noise and flips", panel=_MORE)

    def check(self) -> None:
        for name in ("p", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} = {getattr(self, name)}: expected a probability from 0 to 1"
                )
        self._positive("steps", "batch_size", "accumulation", "lr")
        self._positive("checkpoint_every", "snapshot_every", "micro_batch")
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
        if self.micro_batch:
            raise ConfigError(
                f"micro_batch = {self.micro_batch}: multitask = {self.multitask!r} balances the "
                f"losses of whole batches; use --gradient-checkpointing for less memory"
            )
        if self.loss_weighting == "uncertainty":
            raise ConfigError("multitask and loss_weighting = 'uncertainty' both learn weights")


SEARCHES = ("none", "grid", "random", "cmaes", "tpe", "gradient")
METHODS = ("linear", "ties", "dare", "slerp", "model-stock")
_METHOD, _SEARCH, _REPORT = "Method", "Search", "Report"


@dataclass(frozen=True)
class MergeConfig(Settings):
    """[merge]: the coefficients w_i of Eq. 8 and how they are found."""

    coefficients: list[float] | None = setting(
        None,
        "the w_i, as in 0.1,0.1,0.2,0.5, in the order of the arguments (in deme.toml: of the "
        "ranges); unset: 1/N each",
        flags="--coefficients -w",
        parse=parse_numbers,
    )
    method: str = setting(
        "linear", "how experts become one network", choices=METHODS, panel=_METHOD
    )
    density: float = setting(
        0.5, "share of each task vector that ties and dare keep", panel=_METHOD
    )
    trim: str = setting(
        "model", "what ties trims by size: the whole task vector, or tensor by tensor",
        choices=("model", "tensor"), option=False)  # fmt: skip
    mask_seed: int = setting(0, "seed of what dare drops", option=False)
    per: str = setting(
        "model", "what shares its coefficients", choices=("model", "block", "layer"), panel=_SEARCH
    )
    search: str = setting("none", "how to choose the coefficients", choices=SEARCHES, panel=_SEARCH)
    objective: str = setting(
        "loss",
        "what a search minimises: loss, experts, kid, fid, or a ladder as loss:64,kid@1k:16,fid@5k",
        panel=_SEARCH,
    )
    loss_range: str | None = setting(
        None, "timesteps that loss and experts are measured on, as 250:500; unset: all",
        option=False)  # fmt: skip
    grid: list[Any] | None = setting(
        None,
        "values tried for every expert, as 0,0.5,1, or a list for each, as '0,0.5;0,1'; "
        "unset: 0,0.5,1 for up to 4 experts, 0,1 for up to 8",
        panel=_SEARCH,
        parse=parse_lists,
    )
    bounds: list[Any] | None = setting(
        None, "lowest and highest coefficient of every expert, or of each; unset: -0.5, 1.5",
        option=False)  # fmt: skip
    start: list[float] | None = setting(
        None, "where a search begins; unset: 1/N each", option=False
    )
    evaluations: int | None = setting(
        None, "most candidates to evaluate; unset: what the search usually needs", panel=_SEARCH
    )
    time: str | None = setting(None, "most time to search, as 90s, 30m or 2h", option=False)
    num: int = setting(
        2048,
        "held-out draws (loss, experts) or images (kid, fid) per candidate",
        flags="--num -n",
        panel=_SEARCH,
    )
    steps: int = setting(20, "sampling steps per candidate image (kid, fid)", panel=_SEARCH)
    batch_size: int = setting(256, "images denoised at a time", option=False)
    seed: int = setting(
        1_000_003,
        "seed of the candidates' noise and of the search; disjoint from the seeds of eval",
        panel=_SEARCH,
    )
    report: bool | None = setting(
        None,
        "measure the merged model beside base, ensemble, means and single experts, on "
        "other seeds and images; unset: after a search",
        flags="--report/--no-report",
        panel=_REPORT,
    )
    report_num: int | None = setting(
        None, "draws or images per row of the report; unset: as num", option=False
    )
    report_repeats: int = setting(3, "seeds of the report", option=False)
    report_seed: int = setting(2_000_003, "first seed of the report", option=False)

    @classmethod
    def combine(cls, table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Coefficients that are given take the place of a search in the file, and the other way."""
        instead = {"search"} if given.get("coefficients") is not None else set()
        if given.get("search") not in (None, "none"):
            instead.add("coefficients")
        return {**{k: v for k, v in table.items() if k not in instead}, **given}

    def check(self) -> None:
        if self.coefficients is not None and self.search != "none":
            raise ConfigError(
                "coefficients are given, and a search is to look for them; keep one of the two"
            )
        self._positive("num", "steps", "batch_size", "evaluations", "report_num", "report_repeats")
        self._not_negative("seed", "mask_seed", "report_seed")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density = {self.density}: expected a share above 0, at most 1")
        parse_stages(self.objective, num=self.num)
        if self.loss_range is not None:
            parse_span(self.loss_range, "loss_range")


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
