"""What a row trains and merges with: the common settings, those of its kind, its own. No torch.

A row of kind finetune is plain where it does not say otherwise: every timestep alike, no pull to
the base, no projection. What sets a row apart is told against that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deme_cli.comparison.digests import deciding
from deme_cli.comparison.plan import RowPlan
from deme_cli.config import FinetuneConfig, MergeConfig
from deme_cli.errors import ConfigError

PLAIN = {"p": 0.0, "consistency": 0.0, "projection": "none"}  # of rows of kind finetune
Tables = Mapping[str, Mapping[str, Any]]


def finetune_settings(row: RowPlan, tables: Tables, *, updates: int) -> FinetuneConfig:
    """Every setting of a row's training: the common ones, those of its kind, its own.

    Raises ConfigError, naming the row, on settings that do not go together.
    """
    plain = PLAIN if row.kind == "finetune" else {}
    if updates < row.n:
        raise ConfigError(f"row {row.name!r}: {row.n} ranges cannot share {updates} updates")
    steps = {"steps": updates // row.n, "snapshot_every": None, "ema_lengths": None}
    try:
        return FinetuneConfig(**{**tables.get("finetune", {}), **plain, **row.finetune, **steps})
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: {error}") from error


def merge_settings(row: RowPlan, tables: Tables) -> MergeConfig | None:
    """Every setting of a row's merge; None for a row of another kind.

    Raises ConfigError, naming the row, on settings that do not go together.
    """
    if row.kind != "merged":
        return None
    try:
        config = MergeConfig(**{**tables.get("merge", {}), **row.merge})
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: [merge] {error}") from error
    given = config.coefficients
    if given is not None and len(given) != row.n:
        raise ConfigError(
            f"row {row.name!r}: [merge] coefficients = {given}: expected {row.n}, one a range"
        )
    return config


def settings_apart(
    row: RowPlan, config: FinetuneConfig, merge: MergeConfig | None, tables: Tables
) -> dict[str, Any]:
    """What sets a row apart from plain finetuning with the common settings."""
    plain = deciding(FinetuneConfig(**{**tables.get("finetune", {}), **PLAIN}))
    ours = deciding(config)
    apart = {name: ours[name] for name in ours if name != "steps" and ours[name] != plain.get(name)}
    if row.n > 1:
        apart["by"] = row.by
    if merge is None:
        return apart
    default, own = deciding(MergeConfig()), deciding(merge)
    told = {name: own[name] for name in own if own[name] != default[name]}
    return {**apart, "search": merge.search, **told}
