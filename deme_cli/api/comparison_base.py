"""The base that every row of a comparison starts from: that of the run, or one imported for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.config import CONFIG_NAME, SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile, read_run_file
from deme_cli.training.split import split

if TYPE_CHECKING:
    from deme_cli.comparison.plan import Plan


def base_of(plan: Plan, run: RunFile, place: Path, *, model: str | None) -> tuple[RunFile, Path]:
    """The base that every row starts from, and the `deme.toml` that goes with it.

    That of this folder, unless a model is asked for; else what an earlier run imported into
    `place`; else it is imported there now.
    """
    told = plan.tables.get("model", {})
    if run.path is not None and model is None:
        return run, run.base
    source = model or told.get("source")
    if not (place / CONFIG_NAME).exists():
        data = plan.tables.get("data", {}).get("source")
        _import(source or "digits", data, told.get("pipeline"), plan.n, place)
        source = None  # nothing to compare with
    found = read_run_file(place / CONFIG_NAME)
    if source is not None and not _is_of(found, source):
        raise ConfigError(
            f"{place}: made before from {found.tables['model']['source']!r}, not {source!r}; "
            f"choose another --output"
        )
    return found, found.base


def _import(source: str, data: str | None, pipeline: str | None, n: int, place: Path) -> None:
    done = split(source, SplitConfig(n=n), data=data, pipeline=pipeline, output=place, force=True)
    for assumed in done.facts["notes"]:
        console.warn(assumed)
    console.note(f"{done.record.source}: imported, {done.facts['parameters']:,} parameters")


def _is_of(run: RunFile, model: str) -> bool:
    """Whether the base of `run` is what `model` names: imported from it, or the same weights."""
    from deme_cli.artifacts import read_record

    has, path = run.tables["model"]["source"], Path(model)
    if has in (model, str(path.resolve())):
        return True
    return path.is_file() and read_record(path).fingerprint == read_record(run.base).fingerprint
