"""Settings: what one is, and a frozen dataclass for each table of deme.toml.

Precedence: command line, then `deme.toml`, then the defaults here, and nowhere else. A setting says
what it means (in `--help` and in the comments of `deme.toml`), its type, and which values make
sense; a table checks itself, so a config that exists is a config that can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from deme_cli.errors import ConfigError
from deme_cli.timesteps import TimestepRange, parse_span

CONFIG_NAME = "deme.toml"
AFFINITY_NAME = "gradients.json"  # what gradients are written to, by which a split may cluster
EVAL_NUM = 50_000  # images of a row where nothing says otherwise
DTYPES = ("fp32", "bf16", "fp16")
COMPILE = ("auto", "on", "off")
PROJECTIONS = ("fold", "block", "none")
LR_SCHEDULES = ("constant", "linear", "cosine")
TIMESTEP_DRAWS = ("per-sample", "per-batch")
WEIGHTINGS = (
    "none", "uniform", "snr+1", "truncated-snr", "min-snr", "soft-min-snr", "p2", "uncertainty",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio")
MULTITASK = ("none", "uw", "nashmtl", "pcgrad")
DIVISIONS = ("uniform", "snr", "log-snr", "gradient")
SEARCHES = ("none", "grid", "random", "cmaes", "tpe", "gradient")
METHODS = ("linear", "ties", "dare", "slerp", "model-stock")
SAMPLERS = ("ddim", "ddpm", "pndm", "dpm++", "euler", "heun", "unipc", "deis", "lms")
SPACINGS = ("leading", "linspace", "trailing")
PROTOCOLS = (
    "ddim-cifar10", "lsun-church-50k", "lsun-bedroom-50k", "bk-sdm-coco30k", "parti", "imagenet",
)  # fmt: skip
RESIZES = ("clean", "legacy_pytorch", "legacy_tensorflow")
CROPS = ("centre", "random")
NOT_RESULT = (  # of FinetuneConfig: they leave the weights alone, but for rounding
    "checkpoint_every", "held_out", "cache", "gradient_checkpointing", "micro_batch", "log_with",
)  # fmt: skip


class Range(NamedTuple):
    """Which numbers a setting takes; NaN is in none of them."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("a number above 0", lambda x: x > 0)
FROM_0 = Range("0 or more", lambda x: x >= 0)
FROM_2 = Range("at least 2", lambda x: x >= 2)
PROBABILITY = Range("a probability from 0 to 1", lambda x: 0 <= x <= 1)
SHARE = Range("a share above 0, at most 1", lambda x: 0 < x <= 1)
DECAY = Range("0 or more, below 1", lambda x: 0 <= x < 1)


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    within: Range = POSITIVE,
    flags: str = "",
    parse: Callable[[str, str], Any] | None = None,
    option: bool = True,
    instead_of: str = "",
) -> Any:
    """A field with its one-sentence help and the words or numbers that it takes.

    flags: of its option, as `-n` or `--flip/--no-flip`; a long one is its name where none is given.
    parse: the value of a text on the command line and the flag before it, for what is more than one
    word or number.   option: whether there is one, or the setting is one of deme.toml alone.
    instead_of: the setting whose value in deme.toml no longer counts where this one is given.
    """
    return field(default=default, metadata=locals())


class FromFile(list[Any]):
    """A list as a deme.toml has it. One with a value for each expert goes by their ranges, not, as
    a list that was given to a command or a function, by the order of its arguments."""


@dataclass(frozen=True)
class Settings:
    """A table of settings. Raises ConfigError naming the one that makes no sense.

    PANELS: where `--help` lists them, by the title of a panel.
    """

    PANELS: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if value is not None and choices and value not in choices:
                raise ConfigError(f"{item.name} = {value!r}: expected one of {', '.join(choices)}")
            within = item.metadata["within"]
            if type(value) in (int, float) and not within.holds(value):
                raise ConfigError(f"{item.name} = {value}: expected {within.words}")
        for message in self.contradictions():
            raise ConfigError(message)

    def contradictions(self) -> Iterator[str]:
        """What is wrong with settings that are each right alone; a table has its own."""
        return iter(())


def parse_numbers(text: str, what: str) -> list[float]:
    """`0.1,0.2` as numbers. Raises ConfigError naming `what`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} {text!r}: expected numbers separated by commas") from error


def parse_lists(text: str, what: str) -> list[Any]:
    """`0,1` as one list for all, `0,1;0,2` as a list of lists."""
    lists = [parse_numbers(part, what) for part in text.split(";")]
    return lists if len(lists) > 1 else lists[0]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """[model]: where the base came from and where its artifact lies."""

    source: str = setting("", "what `deme split` imported")
    base: str = setting("base.safetensors", "the imported base, beside this file")
    pipeline: str | None = setting(
        None, "folder or hub id of VAE and text encoders; unset: the source's"
    )
    PANELS: ClassVar = {"Common": "pipeline"}


@dataclass(frozen=True)
class DataConfig(Settings):
    """[data]: the training images."""

    source: str = setting(
        "", "known name, folder of images, hub dataset or samples", flags="--data"
    )
    horizontal_flip: bool | None = setting(
        None, "mirror at random; unset: all but digits", flags="--flip/--no-flip"
    )
    captions: str | None = setting(
        None, "column of captions or classes; unset: text, caption, prompt or label"
    )
    crop: str = setting("centre", "what of an image is kept in training", choices=CROPS)
    resolution: int | None = setting(None, "pixels per side in training; unset: the model's own")
    PANELS: ClassVar = {"Images and captions": "horizontal_flip captions crop resolution"}


@dataclass(frozen=True)
class SplitConfig(Settings):
    """[split]: how [0, T) is divided."""

    n: int = setting(4, "number of timestep ranges, one expert each", flags="-n --num-ranges")
    by: str = setting("uniform", "what the ranges have in common", choices=DIVISIONS)
    ranges: list[str] | None = setting(None, "the ranges themselves, as start:stop")

    @property
    def timestep_ranges(self) -> list[TimestepRange]:
        return [parse_span(text, "[split] ranges:") for text in self.ranges or []]


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """[finetune]: what one expert minimises and how (Eq. 3-6, rates of the released recipe)."""

    p: float = setting(0.3, "probability that t is from all of [0, T) (Eq. 6)", within=PROBABILITY)
    steps: int = setting(20_000, "optimizer updates")
    batch_size: int = setting(64, "images per optimizer update, before accumulation", flags="-b")
    accumulation: int = setting(1, "batches whose gradients make one update")
    lr: float = setting(5e-5, "peak learning rate")
    lr_schedule: str = setting("constant", "learning rate over the run", choices=LR_SCHEDULES)
    warmup: int = setting(0, "updates over which the learning rate rises from 0", within=FROM_0)
    consistency: float = setting(
        1.0, "weight of the consistency loss (Eq. 4); 0: none", within=FROM_0
    )
    projection: str = setting("fold", "place of the channel-wise projection", choices=PROJECTIONS)
    lora: int | None = setting(
        None, "rank of adapters to train in place of the weights (LoRA); unset: the weights"
    )
    lora_alpha: float | None = setting(None, "adapters count alpha / rank times; unset: once")
    lora_targets: str | None = setting(
        None, "layers with adapters: linear, all (convolutions too), a glob; unset: attention"
    )
    timesteps: str = setting(
        "per-sample",
        "what p is drawn for: each image, or a batch as in the official code",
        choices=TIMESTEP_DRAWS,
    )
    antithetic: bool = setting(
        False,
        "draw timesteps in mirrored pairs t and start + stop - 1 - t, as in the official code",
        flags="--antithetic/--independent",
    )
    loss_weighting: str = setting(
        "none",
        "weight of each timestep in the loss: none (as the network's own target has it), uniform "
        "on the noise, a published one, or learned (uncertainty, as EDM2)",
        choices=WEIGHTINGS,
    )
    weighting_gamma: float | None = setting(
        None, "gamma of min-snr, soft-min-snr, p2; unset: 5, 5, 1"
    )
    weighting_k: float = setting(1.0, "the k of p2")
    normalise_weighting: bool = setting(
        False,
        "scale the loss weighting to a mean of 1 over all timesteps",
        flags="--normalise-weighting/--raw-weighting",
    )
    multitask: str = setting(
        "none", "how clusters of timesteps share updates (ANT)", choices=MULTITASK
    )
    clusters: int = setting(5, "clusters of timesteps for --multitask")
    cluster_by: str = setting(
        "uniform", "what timesteps of a cluster have in common", choices=DIVISIONS
    )
    multitask_lr: float = setting(0.025, "learning rate of the task weights of uw")
    multitask_every: int = setting(25, "updates between new task weights of nashmtl")
    ema_decay: float = setting(0.9999, "largest decay of the weights' EMA; 0: none", within=DECAY)
    ema_lengths: list[float] | None = setting(
        None,
        "relative lengths of power-function EMAs to write as well, as 0.05,0.1; unset: none",
        parse=parse_numbers,
    )
    weight_decay: float = setting(1e-6, "AdamW weight decay", within=FROM_0)
    beta1: float = setting(0.95, "AdamW first-moment decay", within=DECAY)
    beta2: float = setting(0.999, "AdamW second-moment decay", within=DECAY)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 turns clipping off", within=FROM_0)
    checkpoint_every: int = setting(1000, "updates between checkpoints")
    snapshot_every: int | None = setting(
        None, "updates between experts kept on the way; unset: none"
    )
    held_out: int = setting(512, "held-out draws for the loss at checkpoints", within=FROM_0)
    caption_dropout: float = setting(
        0.1, "share of captions or classes left out", within=PROBABILITY
    )
    cache: str = setting(
        "auto", "latents and embeddings on disk: auto (beside the base), off, a folder"
    )
    gradient_checkpointing: bool = setting(
        False,
        "compute activations again in the backward pass: less memory, a third more time",
        flags="--gradient-checkpointing/--keep-activations",
    )
    micro_batch: int | None = setting(
        None,
        "images per forward and backward; changes rounding alone; unset: the whole batch. "
        "Halved where a GPU's memory runs out",
    )
    log_with: str | None = setting(
        None, "where the curve of *.metrics.jsonl goes as well; unset: nowhere", choices=TRACKERS
    )
    seed: int = setting(0, "seed of data order, timesteps, noise and flips", within=FROM_0)
    PANELS: ClassVar = {
        "Optimisation": "batch_size accumulation lr lr_schedule warmup ema_decay ema_lengths "
        "weight_decay beta1 beta2 grad_clip",
        "Weights of timesteps": "loss_weighting weighting_gamma weighting_k normalise_weighting "
        "multitask clusters cluster_by multitask_lr multitask_every",
        "Images and captions": "caption_dropout cache",
        "Memory": "gradient_checkpointing micro_batch",
        "Adapters": "lora lora_alpha lora_targets",
        "More": "timesteps antithetic checkpoint_every snapshot_every held_out seed",
    }

    def contradictions(self) -> Iterator[str]:
        """What belongs to another setting is refused where it would do nothing."""
        lengths, weighting = self.ema_lengths or [], self.loss_weighting
        if self.snapshot_every and self.snapshot_every >= self.steps:
            yield f"snapshot_every = {self.snapshot_every}: expected less than steps = {self.steps}"
        if len(set(lengths)) < len(lengths) or not all(0 < s < 12**-0.5 for s in lengths):
            # 12^(-1/2) is the length of the plain mean
            yield f"ema_lengths = {lengths}: expected different numbers above 0, below 0.2886"
        for name, is_given, weightings in (
            ("weighting_gamma", self.weighting_gamma, ("min-snr", "soft-min-snr", "p2")),
            ("weighting_k", self.weighting_k != 1, ("p2",)),
            ("normalise_weighting", self.normalise_weighting, WEIGHTINGS[1:-1]),
        ):
            if is_given and weighting not in weightings:
                yield (
                    f"{name} belongs to {', '.join(weightings)}, not to loss_weighting = "
                    f"{weighting!r}"
                )
        if self.lora and self.projection == "block":
            yield "lora trains adapters alone; --projection block adds full matrices"
        for name in ("lora_alpha", "lora_targets"):
            if not self.lora and getattr(self, name) is not None:
                yield f"{name} belongs to lora = RANK, which is not set"
        if self.multitask == "none":
            return
        if not 2 <= self.clusters <= self.batch_size:
            yield (
                f"clusters = {self.clusters}: expected from 2 to batch_size = {self.batch_size}, "
                f"for each cluster has its share of every batch"
            )
        for name in ("antithetic", "timesteps", "micro_batch"):
            if getattr(self, name) != getattr(type(self), name):
                yield (
                    f"multitask = {self.multitask!r} draws timesteps by cluster and balances the "
                    f"losses of whole batches; leave {name} at its default"
                )
        if weighting == "uncertainty":
            yield "multitask and loss_weighting = 'uncertainty' both learn weights"


@dataclass(frozen=True)
class MergeConfig(Settings):
    """[merge]: the coefficients w_i of Eq. 8 and how they are found."""

    coefficients: list[float] | None = setting(
        None,
        "the w_i, as in 0.1,0.1,0.2,0.5, in the order of the arguments (in deme.toml: of the "
        "ranges); unset: 1/N each",
        flags="-w",
        parse=parse_numbers,
        instead_of="search",
    )
    method: str = setting("linear", "how experts become one network", choices=METHODS)
    density: float = setting(0.5, "share of each task vector that ties and dare keep", within=SHARE)
    trim: str = setting(
        "model",
        "what ties trims by size: the whole task vector, or tensor by tensor",
        choices=("model", "tensor"),
        option=False,
    )
    mask_seed: int = setting(0, "seed of what dare drops", option=False, within=FROM_0)
    per: str = setting("model", "what shares its coefficients", choices=("model", "block", "layer"))
    lora: int | None = setting(
        None,
        "of adapters: write one LoRA of this rank, exact from the sum of theirs on; unset: the "
        "whole weights",
    )
    search: str = setting(
        "none", "how to choose the coefficients", choices=SEARCHES, instead_of="coefficients"
    )
    objective: str = setting(
        "loss",
        "what a search minimises: loss, experts, kid, fid, or several in turn, as "
        "loss:64,kid@1k:16,fid@5k",
    )
    loss_range: str | None = setting(
        None,
        "timesteps that loss and experts are measured on, as 250:500; unset: all",
        option=False,
    )
    grid: list[Any] | None = setting(
        None,
        "values tried for every expert, as 0,0.5,1, or a list for each, as '0,0.5;0,1'; "
        "unset: 0,0.5,1 for up to 4 experts, 0,1 for up to 8",
        parse=parse_lists,
    )
    bounds: list[Any] | None = setting(
        None,
        "lowest and highest coefficient of every expert, or of each; unset: -0.5, 1.5",
        option=False,
    )
    start: list[float] | None = setting(
        None, "where a search begins; unset: 1/N each", option=False
    )
    evaluations: int | None = setting(None, "most candidates; unset: what the search usually needs")
    time: str | None = setting(None, "most time to search, as 90s, 30m or 2h", option=False)
    num: int = setting(2048, "draws (loss, experts) or images (kid, fid) per candidate", flags="-n")
    steps: int = setting(20, "sampling steps per candidate image (kid, fid)")
    batch_size: int = setting(256, "images denoised at a time", option=False)
    seed: int = setting(
        1_000_003,
        "seed of the candidates' noise and of the search; disjoint from the seeds of eval",
        within=FROM_0,
    )
    report: bool | None = setting(
        None,
        "measure the merged model beside base, ensemble, means and single experts, on "
        "other seeds and images; unset: after a search",
        flags="--report/--no-report",
    )
    report_num: int | None = setting(
        None, "draws or images per row of it; unset: num", option=False
    )
    report_repeats: int = setting(3, "seeds of the report", option=False)
    report_seed: int = setting(2_000_003, "first seed of the report", option=False, within=FROM_0)
    PANELS: ClassVar = {
        "Method": "method density lora",
        "Search": "per search objective grid evaluations num steps seed",
        "Report": "report",
    }

    def contradictions(self) -> Iterator[str]:
        if self.coefficients is not None and self.search != "none":
            yield "coefficients are given, and a search is to look for them; keep one of the two"


@dataclass(frozen=True)
class SampleConfig(Settings):
    """[sample]: how images are drawn."""

    num: int | None = setting(None, "images; unset: 64, or those of the prompts", flags="-n")
    sampler: str | None = setting(
        None,
        "diffusers scheduler that denoises; unset: the checkpoint's own, or the next that fits "
        "(ddim for pixels, if trained by ddpm and not all timesteps are steps)",
        choices=SAMPLERS,
    )
    steps: int = setting(50, "denoising steps")
    eta: float = setting(0.0, "noise added by DDIM: 0 none, 1 as much as DDPM", within=FROM_0)
    spacing: str | None = setting(
        None, "spacing in [0, T); unset: the checkpoint's own", choices=SPACINGS
    )
    guidance: float | None = setting(
        None,
        "classifier-free guidance scale, 1 for none; unset: that of the model's pipeline",
        within=FROM_0,
    )
    prompts: str | None = setting(
        None, "prompts: a file (txt, csv, tsv, json), parti, coco, imagenet, digits, or text:PROMPT"
    )
    prompt_column: str | None = setting(None, "column of prompts; unset: prompt, caption or text")
    classes: str | None = setting(None, "classes drawn in turn, as 0,3,7 or 0-9; unset: all")
    per_prompt: int = setting(1, "images of each prompt")
    resolution: int | None = setting(None, "pixels per side that the model draws; unset: its own")
    resize: int | None = setting(None, "pixels per side of the images kept", flags="--resize-to")
    batch_size: int = setting(256, "images denoised at a time; changes none", flags="-b")
    seed: int = setting(0, "seed of the noise; image i depends on (seed, i) alone", within=FROM_0)
    PANELS: ClassVar = {
        "What is shown": "prompts prompt_column classes per_prompt",
        "Size": "resolution resize",
    }


@dataclass(frozen=True)
class EvalConfig(Settings):
    """[eval]: what is measured, against what, on how many images. Sampling follows [sample]."""

    protocol: str | None = setting(
        None, "published sampler, counts and extractor", choices=PROTOCOLS
    )
    fid: str | None = setting(
        None,
        "reference of the Fréchet distance: digits, cifar10, images, samples, statistics, .npz",
    )
    kid: str | None = setting(None, "reference of the kernel distance: images, as for fid")
    prc: str | None = setting(
        None, "reference of precision, recall, density and coverage: images, as for fid"
    )
    neighbours: int = setting(3, "k of precision, recall, density and coverage")
    clip_score: bool = setting(False, "measure the CLIP score of prompts and images")
    clip_model: str = setting("ViT-g-14", "architecture of the CLIP score, as open_clip calls it")
    clip_weights: str = setting(
        "laion2b_s34b_b88k", "weights of the CLIP score: a tag of open_clip, a file or local-dir:"
    )
    features: str | None = setting(
        None,
        "what a distance is taken on: inception, clip, dinov2, digits or a TorchScript file; "
        "unset: digits for digits, else inception",
    )
    resize: str = setting("clean", "how images come to the extractor's size", choices=RESIZES)
    num: int | None = setting(
        None,
        f"images per row and repeat; unset: {EVAL_NUM:,}, or as many as the prompts make",
        flags="-n",
    )
    repeats: int = setting(1, "independent seeds per row; their mean and sd are shown")
    batch_size: int = setting(128, "images per forward of the extractor", flags="-b")
    seed: int = setting(0, "first seed; repeat r uses seed + r", within=FROM_0)
    mixed: bool = setting(False, "allow rows that were drawn under different protocols")


TABLES: dict[str, type[Settings]] = {
    "model": ModelConfig, "data": DataConfig, "split": SplitConfig, "finetune": FinetuneConfig,
    "merge": MergeConfig, "sample": SampleConfig, "eval": EvalConfig,
}  # fmt: skip
