"""The options of `deme merge`: words to be read (bounds, times, globs), and what goes with what."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.ladder import Rung, parse_ladder
from deme_cli.settings import parse_numbers

DATA_DRIVEN = ("regmean", "fisher")
CLOSED_FORMS = ("slerp", "model-stock", *DATA_DRIVEN)  # nothing to search for
_TIME = re.compile(r"([0-9.]+)\s*([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_GRADIENT_OF = ("loss", "experts")
_OF_ROWS = ("--objective", "--num", "--steps", "--batch-size")  # what a report alone reads as well


def looks_for(table: Mapping[str, Any], *, method: str | None, search: str | None) -> bool:
    """Whether a merge looks for its coefficients: options, None where absent, before [merge]."""
    method = method or table.get("method", MergeConfig.method)
    search = search or table.get("search", MergeConfig.search)
    return search != "none" or method == "greedy"


def parse_lists(text: str, flag: str) -> list[Any]:
    """`0,1` as one list for every expert, `0,1;0,2` as one list per expert."""
    lists = [parse_numbers(part, flag) for part in text.split(";")]
    return lists if len(lists) > 1 else lists[0]


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


def parse_coefficients_for(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """`GLOB=w1,w2` as the coefficients of the tensors that a glob matches."""
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        glob, sign, numbers = text.partition("=")
        if not sign or not glob:
            raise ConfigError(
                f"--coefficients-for {text!r}: expected GLOB=w1,w2, as in 'mid_block.*=0.5,0,1'"
            )
        found[glob] = tuple(parse_numbers(numbers, f"--coefficients-for {glob}="))
    return found


def resolve_bounds(values: Sequence[Any] | None, num_experts: int) -> list[tuple[float, float]]:
    """Lower and upper bound of each expert's coefficient. Raises ConfigError on another shape."""
    values = [-0.5, 1.5] if values is None else list(values)
    pairs = values if any(isinstance(v, list) for v in values) else [values] * num_experts
    if len(pairs) != num_experts:
        raise ConfigError(
            f"the bounds have {len(pairs)} pairs for {num_experts} experts; give one pair for all, "
            f"or one for each, as in --bounds '0,1;0,2'"
        )
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(f"bounds {pair}: expected the lowest and the highest, as in 0,1")
        if not all(map(math.isfinite, pair)):
            raise ConfigError(f"bounds {pair}: expected finite numbers")
    return [(float(low), float(high)) for low, high in pairs]


def require_use(settings: MergeConfig, given: Mapping[str, Any], of_search: Sequence[str]) -> None:
    """Every option that was given has something to act on.

    given: values by flag, None where absent; of_search: flags that only a search reads.
    """
    for flag in ("--report-num", "--report-repeats", "--report-seed"):
        reports = searches(settings) if settings.report is None else settings.report
        if given[flag] is not None and not reports:
            raise ConfigError(f"{flag} belongs to a report; add --report")
    for flag in of_search:
        is_measured = settings.report and flag in _OF_ROWS
        if given[flag] is not None and not searches(settings) and not is_measured:
            reads = flag in ("--num", "--batch-size", "--seed") and settings.method in DATA_DRIVEN
            if not reads:
                search = "gradient" if flag == "--optimizer" else "grid"
                raise ConfigError(f"{flag} belongs to a search; add --search {search}")
    samples = any(rung.is_distance for rung in _rungs(settings))
    if given["--steps"] is not None and not samples:
        raise ConfigError("--steps are those of sampling; add --objective fid or kid")
    if given["--loss-range"] is not None and all(rung.is_distance for rung in _rungs(settings)):
        raise ConfigError("--loss-range is of the loss; add --objective loss or experts")
    for flag in ("--bounds", "--start"):
        if given[flag] is not None and "greedy" in (settings.search, settings.method):
            raise ConfigError(f"{flag} means nothing to a greedy soup; leave it out")
        if given[flag] is not None and settings.search == "grid":
            raise ConfigError(f"{flag} means nothing to a grid; use --grid, or another --search")
    for flag, method in (("--density", ("ties", "dare")), ("--trim", ("ties",)),
                         ("--mask-seed", ("dare",))):  # fmt: skip
        if given[flag] is not None and settings.method not in method:
            raise ConfigError(f"{flag} belongs to {' and '.join(method)}; add --method {method[0]}")
    for flag, search in (("--grid", "grid"), ("--optimizer", "gradient")):
        if given[flag] is not None and settings.search != search:
            raise ConfigError(f"{flag} belongs to a search {search}; add --search {search}")


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
    if settings.search in ("grid", "greedy", "quadratic") and settings.per == "layer":
        raise ConfigError(
            f"search {settings.search} takes too many candidates for every layer; "
            f"use --search gradient or cmaes"
        )
    if settings.time is not None:
        parse_time(settings.time)
    first = _rungs(settings)[0].name
    if settings.search == "gradient" and first not in _GRADIENT_OF:
        raise ConfigError(
            f"search gradient needs an objective without sampling, found {first!r}; "
            f"use --objective loss, experts, or a ladder that begins with one"
        )


def _rungs(settings: MergeConfig) -> list[Rung]:
    return parse_ladder(settings.objective, num=settings.num)


def searches(settings: MergeConfig) -> bool:
    """Whether coefficients are searched for."""
    return settings.search != "none" or settings.method == "greedy"
