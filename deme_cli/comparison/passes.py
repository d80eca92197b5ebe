"""The FLOPs of a forward and a backward pass, counted once per base and kept in the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from deme_cli.comparison.jobs import Stage
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.files import write_whole
from deme_cli.timesteps import RangeChoice, parse_span
from deme_cli.training.cost import PassCost, count_passes
from deme_cli.training.plan import Job, Plan
from deme_cli.training.preparation import prepare

_NAME = "passes.json"


def passes_of(stage: Stage, projections: Sequence[str]) -> dict[str, PassCost]:
    """The costs of one image through `stage`'s base, by placement of the projection."""
    kept = _read(stage)
    missing = [one for one in projections if one not in kept]
    if missing:
        kept |= _count(stage, missing)
        document = {
            "base": stage.fingerprint,
            "data": dict(stage.tables.get("data", {})),
            "passes": {name: asdict(passes) for name, passes in kept.items()},
        }
        write_whole(stage.folder / _NAME, [json.dumps(document, indent=1).encode()])
    return kept


def _read(stage: Stage) -> dict[str, PassCost]:
    """What was counted before of this base and data; {} where nothing was."""
    try:
        document = json.loads((stage.folder / _NAME).read_text())
        same = document["base"] == stage.fingerprint
        same = same and document["data"] == dict(stage.tables.get("data", {}))
        return {n: PassCost(**v) for n, v in document["passes"].items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        return {}


def _count(stage: Stage, projections: Sequence[str]) -> dict[str, PassCost]:
    """Count on the CPU, on one image; consistency is on, so that the base is counted, too."""
    settings = FinetuneConfig(consistency=1.0, held_out=0, cache="off", batch_size=1)
    job = Job(
        base=stage.base,
        images=DataConfig(**stage.tables.get("data", {})),
        settings=settings,
        device="cpu",
        pipeline=stage.tables.get("model", {}).get("pipeline"),
    )
    ranges = next(iter(stage.ranges.values()))
    whole = parse_span(f"0:{ranges[-1].split(':')[1]}", "range")
    run = prepare(Plan(job, "1/1", RangeChoice(whole, 1, 1), Path("unused.safetensors")))
    return {
        name: count_passes(replace(run, config=replace(settings, projection=name)))
        for name in projections
    }
