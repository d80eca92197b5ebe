"""Along what a landscape goes and which ranges it tells apart, where it is not told. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from deme_cli.analysis_config import ALONG
from deme_cli.errors import ConfigError
from deme_cli.timesteps import TimestepRange, split_uniform

_DEFAULTS = {1: "random", 2: "line", 3: "vectors"}  # by the number of models


def choose_along(given: str | None, num_models: int) -> str:
    """What a landscape of so many models goes along.

    Raises ConfigError where `given` takes another number of them.
    """
    along = given or _DEFAULTS.get(num_models, "pca")
    least, most, what = ALONG[along]
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
