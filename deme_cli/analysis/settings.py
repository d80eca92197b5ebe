"""Settings of the analyses: how much each measures.

They have no table in deme.toml: each `deme analyze …` has an option for every one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.config import FROM_0, FROM_2, Range, Settings, setting
from deme_cli.errors import ConfigError
from deme_cli.timesteps import TimestepRange, split_uniform

# as documents say
ANALYSES = ("losses", "forecast", "gradients", "activations", "landscape", "task-vectors")
SPLITS = ("train", "held-out")  # of the images that are looked at
_BATCH = "--batch-size -b"


def bucket_ranges(buckets: int, num_train_timesteps: int) -> list[TimestepRange]:
    """So many parts of [0, T). Raises ConfigError where there are fewer timesteps."""
    if buckets > num_train_timesteps:
        raise ConfigError(
            f"buckets = {buckets}: this model has {num_train_timesteps} timesteps; choose fewer "
            f"--buckets"
        )
    return split_uniform(buckets, num_train_timesteps)


@dataclass(frozen=True)
class LossConfig(Settings):
    """`deme analyze losses`."""

    buckets: int = setting(50, "parts of [0, T) whose losses are shown")
    num: int = setting(128, "draws (image, timestep, noise) per bucket")
    batch_size: int = setting(256, "draws per forward; changes rounding alone", flags=_BATCH)
    seed: int = setting(0, "seed of the draws", within=FROM_0)


@dataclass(frozen=True)
class ForecastConfig(Settings):
    """`deme analyze forecast`."""

    updates: int = setting(
        100, "updates of each short expert", within=Range("at least 10", lambda num: num >= 10)
    )
    buckets: int = setting(20, "parts of [0, T) whose losses are compared")
    num: int = setting(512, "draws (image, timestep, noise) per bucket", within=FROM_2)
    batch_size: int = setting(256, "draws per forward; changes rounding alone", flags=_BATCH)
    seed: int = setting(0, "seed of the draws", within=FROM_0)


@dataclass(frozen=True)
class GradientConfig(Settings):
    """`deme analyze gradients`."""

    buckets: int = setting(100, "parts of [0, T) whose gradients are compared", within=FROM_2)
    num: int = setting(512, "draws (image, timestep, noise) per bucket", within=FROM_2)
    batch_size: int = setting(
        256, "draws per forward and backward; changes rounding alone", flags=_BATCH
    )
    seed: int = setting(0, "seed of the draws", within=FROM_0)


@dataclass(frozen=True)
class ActivationConfig(Settings):
    """`deme analyze activations`."""

    num: int = setting(256, "draws (image, timestep, noise) that both models see")
    batch_size: int = setting(16, "draws per forward; changes rounding alone", flags=_BATCH)
    controls: int = setting(
        4,
        "networks with random weight changes of the same size to compare with, 0 for none; each "
        "takes as long as the expert, and fewer tell less",
        within=FROM_0,
    )
    seed: int = setting(0, "seed of the draws and of the random changes", within=FROM_0)


@dataclass(frozen=True)
class LandscapeConfig(Settings):
    """`deme analyze landscape`: a plane of points, on the same draws everywhere."""

    points: int = setting(
        21, "points along each axis", within=Range("at least 3", lambda num: num >= 3)
    )
    span: float | None = setting(
        None,
        "how far it reaches: in lengths of a random direction (unset: 0.1), else past the "
        "models as a share of what they cover (unset: 0.25)",
    )
    num: int = setting(
        2048, "draws (image, timestep, noise) that every point is measured on", within=FROM_2
    )
    report_num: int = setting(
        8192, "fresh draws for the numbers: lowest points, models", within=FROM_2
    )
    batch_size: int = setting(256, "draws per forward; changes rounding alone", flags=_BATCH)
    seed: int = setting(0, "seed of the draws and of random directions", within=FROM_0)


DrawConfig = LossConfig | GradientConfig | ActivationConfig | LandscapeConfig
