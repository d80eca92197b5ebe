"""Where a merged artifact says that it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_cli.artifacts import MergedRecord
from deme_cli.merging.lineage import Family


def merged_record(
    family: Family,
    *,
    coefficients: Sequence[float],
    method: str,
    settings: dict[str, Any],
    coefficients_for: Mapping[str, Sequence[float]] | None = None,
    has_projections: bool = True,
    search: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
) -> MergedRecord:
    """Where a merged file comes from; `parents` in the order of `coefficients`.

    has_projections: whether the file holds the block projections that its parents have.
    """
    base = family.base_record
    placements = {parent.record.projection for parent in family.parents}
    if not has_projections and "block" in placements:
        placements = {"none"}  # nothing has moved them: the base has none
    return MergedRecord(
        source=base.source,
        model_config=base.model_config,
        scheduler_config=base.scheduler_config,
        num_train_timesteps=base.num_train_timesteps,
        companions=base.companions or family.parents[0].record.companions,
        base=base.fingerprint,
        parents=[
            {
                "path": str(parent.path),
                "kind": parent.record.kind,
                "fingerprint": parent.record.fingerprint,
                "range": parent.record.range,
            }
            for parent in family.parents
        ],
        coefficients=[float(w) for w in coefficients],
        coefficients_for={
            glob: [float(w) for w in values] for glob, values in (coefficients_for or {}).items()
        },
        method=method,
        settings=settings,
        projection=placements.pop() if len(placements) == 1 else "mixed",
        search=search,
        report=report,
    )
