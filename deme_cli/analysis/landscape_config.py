"""Settings of a loss landscape: through which weights it goes, how finely and on what measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deme_cli.errors import ConfigError
from deme_cli.settings import Settings, setting
from deme_cli.timesteps import TimestepRange, split_uniform

# Along what: how many models it takes, at least and at most, and what they are.
MODELS = {
    "random": (1, 1, "one model, the origin"),
    "line": (2, 2, "two models, its ends"),
    "vectors": (3, 3, "three models: the origin and two finetuned from it"),
    "pca": (3, None, "three models or more, the first of them the origin"),
}
_DEFAULTS = {0: "random", 1: "random", 2: "line", 3: "vectors"}  # by the number of models
_SPANS = {"random": 0.1}  # the others: a quarter of what they cover


@dataclass(frozen=True)
class LandscapeConfig(Settings):
    """What is measured: a line or a plane of points, on the same draws everywhere."""

    along: str | None = setting(
        None,
        "random: two random directions, filter by filter as long as the weights; vectors: the "
        "plane of two task vectors; pca: that of many; line: from one model to another; unset: "
        "what fits the number of models",
        choices=tuple(MODELS),
    )
    points: int = setting(21, "points along each axis")
    span: float | None = setting(
        None,
        "how far it reaches: in lengths of a random direction (unset: 0.1), else past the "
        "models as a share of what they cover (unset: 0.25)",
    )
    num: int = setting(2048, "draws (image, timestep, noise) that every point is measured on")
    report_num: int = setting(
        8192, "fresh draws for what is told in numbers: lowest points, slopes, models"
    )
    batch_size: int = setting(256, "draws per forward; changes rounding alone")
    jobs: int = setting(1, "processes that share the points; does not change the numbers")
    seed: int = setting(0, "seed of the draws and of random directions")

    def check(self) -> None:
        self._positive("batch_size", "jobs", "span")
        self._not_negative("seed")
        for name, least, why in (
            ("points", 3, "one on each side of the origin"),
            ("num", 2, "a mean and its error"),
            ("report_num", 2, "a mean and its error"),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: needs at least {least}, {why}")

    @property
    def reach(self) -> float:
        """The span, or the default of what it goes along."""
        return _SPANS.get(self.along or "", 0.25) if self.span is None else self.span


def choose_along(given: str | None, num_models: int) -> str:
    """What a landscape of so many models goes along.

    Raises ConfigError where `given` takes another number of them.
    """
    along = given or _DEFAULTS.get(num_models, "pca")
    least, most, what = MODELS[along]
    if num_models < least or (most is not None and num_models > most):
        raise ConfigError(f"--along {along}: takes {what}; {num_models} given")
    return along


def choose_ranges(
    n: int | None, split: Sequence[TimestepRange], own: Sequence[TimestepRange], *,
    default_n: int, num_train_timesteps: int,
) -> list[TimestepRange]:  # fmt: skip
    """The ranges told apart: `n` equal ones, else those of the split, else the experts' own.

    own: the experts' ranges, of which [0, T) is no part; a split that lacks one of the others is
    not theirs. Without any, `default_n` equal ones. Raises ConfigError where one reaches past T.
    """
    if n is not None:
        return split_uniform(n, num_train_timesteps)
    parts = {span for span in own if len(span) < num_train_timesteps}
    found = list(split) if split and parts <= set(split) else sorted(parts)
    found = found or split_uniform(default_n, num_train_timesteps)
    if past := next((span for span in found if span.stop > num_train_timesteps), None):
        raise ConfigError(
            f"[split] ranges: {past} reaches past the {num_train_timesteps} timesteps of this "
            f"model; correct deme.toml, or give -n"
        )
    return found
