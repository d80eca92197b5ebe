"""Settings of the analyses: how much each measures.

They have no table in deme.toml: each `deme analyze …` has an option for every one of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from deme_cli.errors import ConfigError
from deme_cli.settings import Settings, setting
from deme_cli.timesteps import TimestepRange, split_uniform

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
    seed: int = setting(0, "seed of the draws")

    def check(self) -> None:
        self._positive("buckets", "num", "batch_size")
        self._not_negative("seed")


@dataclass(frozen=True)
class GradientConfig(Settings):
    """`deme analyze gradients`."""

    buckets: int = setting(100, "parts of [0, T) whose gradients are compared")
    num: int = setting(512, "draws (image, timestep, noise) per bucket")
    batch_size: int = setting(
        256, "draws per forward and backward; changes rounding alone", flags=_BATCH
    )
    seed: int = setting(0, "seed of the draws")

    def check(self) -> None:
        self._positive("batch_size")
        self._not_negative("seed")
        for name, what in (("buckets", "buckets to compare"), ("num", "draws, half against half")):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} = {getattr(self, name)}: needs at least 2 {what}")


@dataclass(frozen=True)
class ActivationConfig(Settings):
    """`deme analyze activations`."""

    num: int = setting(256, "draws (image, timestep, noise) that both models see")
    batch_size: int = setting(16, "draws per forward; changes rounding alone", flags=_BATCH)
    controls: int = setting(
        4, "networks with random weight changes of the same size to compare with, 0 for none; each "
        "takes as long as the expert, and fewer tell less"
    )  # fmt: skip
    seed: int = setting(0, "seed of the draws and of the random changes")

    def check(self) -> None:
        self._positive("batch_size")
        self._not_negative("seed", "controls")
        if self.num < 2:
            raise ConfigError(f"num = {self.num}: needs at least 2 draws, one to fit, one to test")


@dataclass(frozen=True)
class TaskVectorConfig(Settings):
    """`deme analyze task-vectors`."""

    ranks: bool = setting(
        True, "measure effective ranks; their time grows with the cubes of layer widths",
        flags="--ranks/--no-ranks",
    )  # fmt: skip


@dataclass(frozen=True)
class LandscapeConfig(Settings):
    """`deme analyze landscape`: a plane of points, on the same draws everywhere."""

    points: int = setting(21, "points along each axis")
    span: float | None = setting(
        None,
        "how far it reaches: in lengths of a random direction (unset: 0.1), else past the "
        "models as a share of what they cover (unset: 0.25)",
    )
    num: int = setting(2048, "draws (image, timestep, noise) that every point is measured on")
    report_num: int = setting(8192, "fresh draws for the numbers: lowest points, slopes, models")
    batch_size: int = setting(256, "draws per forward; changes rounding alone", flags=_BATCH)
    seed: int = setting(0, "seed of the draws and of random directions")

    def check(self) -> None:
        self._positive("batch_size", "span")
        self._not_negative("seed")
        for name, least, why in (
            ("points", 3, "one on each side of the origin"),
            ("num", 2, "a mean and its error"),
            ("report_num", 2, "a mean and its error"),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: needs at least {least}, {why}")

    def reach(self, along: str) -> float:
        """The span, or its default on a plane along `random` directions or `vectors`."""
        return {"random": 0.1}.get(along, 0.25) if self.span is None else self.span


ANALYSES: dict[str, type[Settings]] = {  # by the kind of their documents, as the paper has them
    "losses": LossConfig,
    "gradients": GradientConfig,
    "activations": ActivationConfig,
    "landscape": LandscapeConfig,
    "task-vectors": TaskVectorConfig,
}
