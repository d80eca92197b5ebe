"""The options of `deme merge`: coefficients by glob, and which option goes with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from deme_cli.api.merge_settings import rungs_of, searches
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.settings import flags_of, parse_numbers

_OF_SEARCH = ("objective", "grid", "num", "steps", "seed", "evaluations")
_OF_ROWS = ("objective", "num", "steps")  # what a report alone reads as well


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

    for name in _OF_SEARCH:
        is_read = bool(settings.report) and name in _OF_ROWS
        refuse([name], searches(settings) or is_read, "belongs to a search; add --search grid")
    samples = any(rung.is_distance for rung in rungs_of(settings))
    refuse(["steps"], samples, "are those of sampling; add --objective fid or kid")
    refuse(["density"], settings.method in ("ties", "dare"),
           "belongs to ties and dare; add --method ties")  # fmt: skip
    refuse(["grid"], settings.search == "grid", "belongs to a search grid; add --search grid")
