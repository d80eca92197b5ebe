"""The options of `deme merge`: coefficients by glob, and which option goes with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from deme_cli.api.merge_settings import DATA_DRIVEN, rungs_of, searches
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.settings import flags_of, parse_numbers

_OF_SEARCH = (
    "objective", "grid", "num", "steps", "batch_size", "seed", "bounds", "start", "evaluations",
    "time", "optimizer", "loss_range",
)  # fmt: skip
_OF_ROWS = ("objective", "num", "steps", "batch_size")  # what a report alone reads as well


def looks_for(table: Mapping[str, Any], *, method: str | None, search: str | None) -> bool:
    """Whether a merge looks for its coefficients: options, None where absent, before [merge]."""
    method = method or table.get("method", MergeConfig.method)
    search = search or table.get("search", MergeConfig.search)
    return search != "none" or method == "greedy"


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


def require_use(settings: MergeConfig, given: Mapping[str, Any]) -> None:
    """Every option that was given, by its setting, has something to act on."""
    flags = {item.name: flags_of(item)[0] for item in fields(MergeConfig)}
    asked = {name: flags[name] for name, value in given.items() if value is not None}

    def refuse(names: Iterable[str], unless: bool, why: str) -> None:
        for name in names:
            if name in asked and not unless:
                raise ConfigError(f"{asked[name]} {why}")

    distance = [rung.is_distance for rung in rungs_of(settings)]
    is_greedy = "greedy" in (settings.search, settings.method)
    reports = searches(settings) if settings.report is None else settings.report
    refuse(
        ("report_num", "report_repeats", "report_seed"), bool(reports),
        "belongs to a report; add --report",
    )  # fmt: skip
    for name in _OF_SEARCH:
        is_read = (settings.report and name in _OF_ROWS) or (
            settings.method in DATA_DRIVEN and name in ("num", "batch_size", "seed")
        )
        search = "gradient" if name == "optimizer" else "grid"
        refuse(
            [name],
            searches(settings) or bool(is_read),
            f"belongs to a search; add --search {search}",
        )
    refuse(["steps"], any(distance), "are those of sampling; add --objective fid or kid")
    refuse(["loss_range"], not all(distance), "is of the loss; add --objective loss or experts")
    for name in ("bounds", "start"):
        refuse([name], not is_greedy, "means nothing to a greedy soup; leave it out")
        refuse(
            [name], settings.search != "grid",
            "means nothing to a grid; use --grid, or another --search",
        )  # fmt: skip
    for name, methods in (("density", ("ties", "dare")), ("trim", ("ties",)),
                          ("mask_seed", ("dare",))):  # fmt: skip
        refuse(
            [name], settings.method in methods,
            f"belongs to {' and '.join(methods)}; add --method {methods[0]}",
        )  # fmt: skip
    for name, search in (("grid", "grid"), ("optimizer", "gradient")):
        refuse(
            [name],
            settings.search == search,
            f"belongs to a search {search}; add --search {search}",
        )
