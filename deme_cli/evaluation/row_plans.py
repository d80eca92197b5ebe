"""Which rows the table of `deme eval` has: models, samples, and experts that make an ensemble.

Experts of one base whose ranges together cover [0, T) once are one row, the ensemble; an expert of
all of [0, T) is a row of its own. Only headers are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deme_cli.artifacts import ExpertRecord, Record, read_record
from deme_cli.data.image_source import find_files, image_suffixes
from deme_cli.diffusion.model_files import locate_model
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError
from deme_cli.sampling.ensemble import read_ensemble

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class RowPlan:
    """A row to be measured. kind: base, expert, merged, ensemble, samples, or model if unread."""

    name: str
    kind: str
    arguments: tuple[str, ...]


@dataclass
class Rows:
    """The plans of all rows in order, and what the user should know about them."""

    plans: list[RowPlan] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def plan_rows(arguments: Sequence[str]) -> Rows:
    """One row per argument; experts that make an ensemble are one row, in place of the first.

    Raises MissingError for an argument that is not there, ArtifactError for one that cannot be
    measured.
    """
    rows = Rows()
    records = {argument: record_of_file(argument) for argument in arguments}
    experts = {
        argument: record
        for argument, record in records.items()
        if isinstance(record, ExpertRecord) and not _covers_all(record)
    }
    ensembles = {group[0]: group for group in _ensembles(experts)}
    grouped = {argument for group in ensembles.values() for argument in group}
    for argument in arguments:
        if argument in ensembles:
            rows.plans.append(_ensemble_plan(ensembles[argument], many=len(ensembles) > 1))
        elif argument not in grouped:
            rows.plans.append(_plan(argument, records[argument]))
            if argument in experts:
                rows.warnings.append(_lone_warning(argument, experts[argument]))
    _require_own_names(rows)
    return rows


def folder_rows(base: Path) -> Rows:
    """The rows of a run's folder: base, experts and merged model, whichever are there.

    Experts that do not make an ensemble yet are left out, with a warning.
    """
    folder = base.parent
    found = [base, *sorted(folder.glob("ft_*.safetensors")), folder / "merged.safetensors"]
    rows = plan_rows([str(path) for path in found if path.exists()])
    lone = [plan for plan in rows.plans if plan.kind == "expert" and _is_lone(plan)]
    if lone:
        rows.warnings = [
            f"no row for the ensemble: {', '.join(plan.name for plan in lone)} do not cover all "
            f"timesteps once; name a file to measure it alone"
        ]
        rows.plans = [plan for plan in rows.plans if plan not in lone]
    if not rows.plans:
        raise MissingError(
            f"nothing to measure: no {base.name}, no experts that cover all timesteps, no "
            f"merged.safetensors in {folder.resolve()}; name models or samples, or run `deme split`"
        )
    return rows


def record_of_file(argument: str) -> Record | None:
    """The record of an artifact; None for what is no file."""
    path = Path(argument).expanduser()
    return read_record(path) if path.is_file() and path.suffix == ".safetensors" else None


def _plan(argument: str, record: Record | None) -> RowPlan:
    path = Path(argument).expanduser()
    if record is None:
        if path.is_dir() and _is_image_folder(path):
            return RowPlan(path.resolve().name, "samples", (argument,))
        locate_model(argument)
        return RowPlan(path.name, "model", (argument,))
    if record.kind not in ("base", "expert", "merged", "samples"):
        raise ArtifactError(
            f"{argument}: an artifact of kind {record.kind!r} cannot be measured; "
            f"expected a base, expert or merged model, or samples"
        )
    return RowPlan(path.stem, record.kind, (argument,))


def _is_image_folder(path: Path) -> bool:
    parts = ("model_index.json", "config.json", "unet")
    return not any((path / part).exists() for part in parts) and any(
        file.suffix.lower() in image_suffixes() for file in find_files(path)
    )


def _covers_all(record: ExpertRecord) -> bool:
    return len(record.timesteps) == record.num_train_timesteps


def _is_lone(plan: RowPlan) -> bool:
    record = record_of_file(plan.arguments[0])
    return isinstance(record, ExpertRecord) and not _covers_all(record)


def _ensembles(experts: dict[str, ExpertRecord]) -> Iterator[tuple[str, ...]]:
    """Groups of arguments whose experts cover [0, T) once: of one base, then of one N."""
    by_base: dict[str, list[str]] = {}
    for argument, record in experts.items():
        by_base.setdefault(record.base, []).append(argument)
    for group in by_base.values():
        if _cover(group):
            yield tuple(group)
            continue
        by_count: dict[int | None, list[str]] = {}
        for argument in group:
            by_count.setdefault(experts[argument].of, []).append(argument)
        yield from (tuple(part) for part in by_count.values() if _cover(part))


def _cover(arguments: Sequence[str]) -> bool:
    try:
        read_ensemble([Path(argument).expanduser() for argument in arguments])
    except DemeError:
        return False
    return True


def _ensemble_plan(arguments: tuple[str, ...], *, many: bool) -> RowPlan:
    name = f"{ENSEMBLE}-{len(arguments)}" if many else ENSEMBLE
    return RowPlan(name, ENSEMBLE, arguments)


def _lone_warning(argument: str, record: ExpertRecord) -> str:
    return (
        f"{argument}: the expert of timesteps {record.timesteps} will denoise all "
        f"{record.num_train_timesteps}: it makes no ensemble with the others given"
    )


def _require_own_names(rows: Rows) -> None:
    """Where two rows have one name, name them by their arguments; refuse the same one twice."""
    names = [plan.name for plan in rows.plans]
    rows.plans = [
        plan
        if names.count(plan.name) == 1
        else RowPlan(", ".join(plan.arguments), plan.kind, plan.arguments)
        for plan in rows.plans
    ]
    final = [plan.name for plan in rows.plans]
    if twice := next((name for name in final if final.count(name) > 1), None):
        raise ConfigError(f"{twice} is given twice")
