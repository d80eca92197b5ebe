"""What the settings of a merge mean together: what searches, what needs data, what clashes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.ladder import Rung, parse_ladder

CLOSED_FORMS = ("slerp", "model-stock")  # nothing to search for
_TIME = re.compile(r"([0-9.]+)\s*([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_GRADIENT_OF = ("loss", "experts")


def searches(settings: MergeConfig) -> bool:
    """Whether coefficients are searched for."""
    return settings.search != "none"


def rungs_of(settings: MergeConfig) -> list[Rung]:
    """The rungs of the objective, one where it is no ladder."""
    return parse_ladder(settings.objective, num=settings.num)


def parse_time(text: str) -> float:
    """`90s`, `30m`, `2h` or seconds, as seconds. Raises ConfigError."""
    match = _TIME.fullmatch(text.strip())
    try:
        seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"time {text!r}: expected a duration, as 90s, 30m or 2h")
    return seconds


def resolve_bounds(values: Sequence[Any] | None, num_experts: int) -> list[tuple[float, float]]:
    """Lower and upper bound of each expert's coefficient. Raises ConfigError on another shape."""
    values = [-0.5, 1.5] if values is None else list(values)
    pairs = values if any(isinstance(v, list) for v in values) else [values] * num_experts
    if len(pairs) != num_experts:
        raise ConfigError(
            f"the bounds have {len(pairs)} pairs for {num_experts} experts; give one pair for all, "
            f"or one for each, as in bounds = [[0, 1], [0, 2]]"
        )
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(f"bounds {pair}: expected the lowest and the highest, as in [0, 1]")
        if not all(map(math.isfinite, pair)):
            raise ConfigError(f"bounds {pair}: expected finite numbers")
    return [(float(low), float(high)) for low, high in pairs]


def require_sense(settings: MergeConfig) -> None:
    """Method, search and objective go together. Raises ConfigError saying which do not."""
    if settings.method in CLOSED_FORMS and settings.search != "none":
        raise ConfigError(
            f"method {settings.method} has a closed form, there is nothing to search for; "
            f"use --search none"
        )
    if settings.method in CLOSED_FORMS and settings.per != "model":
        raise ConfigError(f"--per {settings.per} goes with methods linear, ties and dare")
    if settings.per != "model" and not searches(settings):
        raise ConfigError(
            f"--per {settings.per} says what a search varies; add --search gradient, or name "
            f"coefficients with --coefficients-for"
        )
    if settings.search == "grid" and settings.per == "layer":
        raise ConfigError(
            f"search {settings.search} takes too many candidates for every layer; "
            f"use --search gradient or cmaes"
        )
    if settings.time is not None:
        parse_time(settings.time)
    first = rungs_of(settings)[0].name
    if settings.search == "gradient" and first not in _GRADIENT_OF:
        raise ConfigError(
            f"search gradient needs an objective without sampling, found {first!r}; "
            f"use --objective loss, experts, or stages that begin with one"
        )
