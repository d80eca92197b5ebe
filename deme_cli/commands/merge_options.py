"""The options of `deme merge`: lists and globs to be read, and which go with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_cli.api.merge_settings import DATA_DRIVEN, rungs_of, searches
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.settings import parse_numbers

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
    samples = any(rung.is_distance for rung in rungs_of(settings))
    if given["--steps"] is not None and not samples:
        raise ConfigError("--steps are those of sampling; add --objective fid or kid")
    if given["--loss-range"] is not None and all(rung.is_distance for rung in rungs_of(settings)):
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
