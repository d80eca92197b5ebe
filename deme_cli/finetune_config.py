"""Settings of a training run: what one expert minimises, and how."""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.errors import ConfigError
from deme_cli.settings import Settings, parse_numbers, setting

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
