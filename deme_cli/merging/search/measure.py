"""What objectives need to know of a run, before anything heavy is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.config import DataConfig, EvalConfig, FinetuneConfig, MergeConfig, SampleConfig
from deme_cli.data.image_source import find_image_source
from deme_cli.errors import ConfigError
from deme_cli.evaluation.references import find_reference
from deme_cli.evaluation.weights import choose_features, find_weights
from deme_cli.training.setup import require_companions

if TYPE_CHECKING:
    from deme_cli.merging.lineage import Family
    from deme_cli.merging.request import Request


@dataclass(frozen=True)
class Measure:
    """What candidates are measured with: the run's images; for distances features and sampling.

    `pipeline` and `cache` are where frozen parts and their latents are, for models that have any;
    `auto` puts the cache beside the base, in `beside`. `report_reference` is what the report takes
    distances to; None takes the held-out images.
    """

    images: DataConfig
    features: str
    resize: str
    sample: SampleConfig
    pipeline: str | None = None
    cache: str = "off"
    device: str = "cpu"
    dtype: str = "fp32"
    beside: Path = Path(".")
    report_reference: str | None = None

    @property
    def source(self) -> str:
        return self.images.source


def find_measure(request: Request) -> Measure:
    """What candidates and rows are measured with, looked for before torch is loaded."""
    run, settings = request.run, request.settings
    images = run.settings(DataConfig)
    source = images.source or _shared_source(request.family)
    if not source:
        raise ConfigError("no images to search with: set [data] source in deme.toml")
    evaluation = run.settings(EvalConfig)
    features = choose_features(evaluation.features, [source])
    find_image_source(source)
    distances = [rung for rung in request.rungs if rung.is_distance]
    if distances:
        if min(rung.num for rung in distances) < 2:
            raise ConfigError("num = 1: a distance needs at least 2 images per candidate")
        weights = find_weights(features, evaluation.resize)
        for rung in distances:
            find_reference(
                source, features, evaluation.resize, weights=weights, split="train",
                kernel=rung.name == "kid",
            )  # fmt: skip
    _warn_of_seeds(settings, evaluation, request)
    named = evaluation.kid if request.rungs[-1].name == "kid" else evaluation.fid
    report_reference = run.seen(named) if named and named != source else None
    if request.reports and request.rungs[-1].is_distance:
        _find_report_reference(request, source, report_reference, features, evaluation)
    sample = run.settings(SampleConfig)
    if sample.prompts:
        sample = replace(sample, prompts=run.seen(sample.prompts))
    pipeline = run.pipeline(request.pipeline)
    require_companions(request.family.base_record, pipeline)
    return Measure(
        replace(images, source=source), features, evaluation.resize, sample, pipeline,
        run.settings(FinetuneConfig).cache, request.device, request.dtype,
        request.family.base.path.parent,
        report_reference,
    )  # fmt: skip


def _find_report_reference(
    request: Request, source: str, other: str | None, features: str, evaluation: EvalConfig
) -> None:
    """Look for what the report takes distances to; warn where the search has seen all of it."""
    distance = request.rungs[-1].name
    weights, kernel = find_weights(features, evaluation.resize), distance == "kid"
    searched, reported = (
        find_reference(
            place, features, evaluation.resize, weights=weights, kernel=kernel, split=split
        )
        for place, split in ((source, "train"), (other or source, None if other else "test"))
    )
    if searched == reported and request.searches:
        console.warn(
            f"{source}: one reference ({reported.kind}) serves the search and its report, which "
            f"then differ in their seeds alone; name another one in [eval] {distance}"
        )


def _warn_of_seeds(settings: MergeConfig, evaluation: EvalConfig, request: Request) -> None:
    """A seed that chooses must not be one that reports."""
    if evaluation.seed <= settings.seed < evaluation.seed + evaluation.repeats:
        console.warn(f"seed {settings.seed} is one that `deme eval` reports with; use another")
    stop = settings.report_seed + settings.report_repeats
    if request.reports and settings.report_seed <= settings.seed < stop:
        raise ConfigError(
            f"seed {settings.seed} chooses the coefficients and would report them as well; "
            f"set another report_seed in [merge] of deme.toml"
        )


def _shared_source(family: Family) -> str | None:
    """The images that all the experts were trained on, if these are the same."""
    sources = {parent.record.data.get("source") for parent in family.parents}
    return sources.pop() if len(sources) == 1 else None
