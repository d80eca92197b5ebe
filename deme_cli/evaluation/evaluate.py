"""`evaluate`: figures of models, ensembles and samples, a row each, under one protocol.

First everything is found and checked without torch: prompts, rows, references, the files of the
networks. Then rows and networks are opened, the cards of the rows are compared, and measure.py
draws and looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.distributed import joined
from deme_cli.errors import ConfigError, GateError
from deme_cli.evaluation.protocols import (
    evaluation_card,
    find_protocol,
    require_reference,
    under_protocol,
)
from deme_cli.evaluation.references import (
    DISTANCES,
    FeatureWeights,
    Reference,
    choose_features,
    find_reference,
    find_weights,
    reference_assets,
    weights_assets,
)
from deme_cli.evaluation.rows import compare_rows, find_prompts, folder_rows, open_rows, plan_rows
from deme_cli.fetch import fetch
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.evaluation.measure import Figure


@dataclass(frozen=True)
class Evaluation:
    """Figures by row and metric, what kind of row each is, and the protocol each was made under.

    distance: the name of the metric that `fid` asked for; None where none was.
    """

    kinds: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    distance: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The rows as `deme eval --json` gives them."""
        rows = [
            {"name": name, "kind": self.kinds[name],
             "metrics": {metric: figure.document for metric, figure in row.items()},
             "protocol": self.protocols[name]}
            for name, row in self.figures.items()
        ]  # fmt: skip
        return {"rows": rows}

    def require_at_most(self, max_fid: float) -> None:
        """Raises GateError if a row's distance is above the one allowed."""
        assert self.distance is not None, "without fid there is no distance"
        distances = {name: row[self.distance].value for name, row in self.figures.items()}
        above = [f"{name} {value:.4g}" for name, value in distances.items() if value > max_fid]
        if above:
            raise GateError(f"{self.distance} above --max-fid {max_fid:g}: {', '.join(above)}")


def evaluate(
    models: Sequence[str | Path] = (), settings: EvalConfig | None = None, *,
    sampling: SampleConfig | None = None, weights: Path | None = None, run: RunFile | None = None,
    pipeline: str | None = None, device: str = "auto", dtype: str = "fp32", compile: str = "auto",
    dry_run: bool = False, progress: Progress = silent,
) -> Evaluation | None:  # fmt: skip
    """Measure images of models: distances to reference images, CLIP score.

    models: artifacts, diffusers folders, hub ids, samples, folders of images; experts that cover
    all timesteps are one row. None: base, experts and merged of the run's folder.   settings,
    sampling: those of `run` if None; `settings` has the number of images and the first seed, and
    what its protocol fixes wins over the run's file and the defaults; to say otherwise here is an
    error, as it is on the command line.   weights: the file of the Inception or CLIP features.
    dry_run: check all, measure nothing; the kinds of the rows come back.   progress: is told
    how far it is.

    Rows of one repeat start from the same noise, so that differences to the first row are paired.
    Figures that are done are kept in the current folder until all are. The processes that this one
    has joined share the batches; all but the first get None. Raises ConfigError, MissingError or
    ArtifactError before anything is drawn, NumericsError, Stopped.
    """
    run, world = run or RunFile(), joined()
    settings = settings or run.settings(EvalConfig)
    named = find_protocol(settings.protocol)
    settings = under_protocol(named, settings, run)
    sampling = sampling or run.settings(SampleConfig)
    sampling = replace(sampling, num=settings.num, seed=settings.seed)
    sampling = under_protocol(named, sampling, run)
    world.require_same({
        "models": list(map(str, models)), **asdict(settings), **asdict(sampling), "dtype": dtype,
    })  # fmt: skip
    with world.first_before_others():
        require_reference(named, settings.fid)
        if named is not None:
            console.note(f"protocol {named.name}: {named.source}")
            console.note(f"not told there: {named.open}")
        prompts, settings, sampling = find_prompts(run, settings, sampling, progress)
        plans, warnings = plan_rows(list(map(str, models))) if models else folder_rows(run.base)
        features, references = _find_features(run, settings, weights, progress)
        clip = None
        if settings.clip_score:  # looked up in open_clip, which loads torch: it comes last
            from deme_cli.evaluation.clip_score import find_clip

            clip = find_clip(settings.clip_model, run.seen(settings.clip_weights))
    if dry_run:
        measures = ", ".join([*references, *["clip_score"] * bool(clip)])
        sources = ", ".join(reference.source for reference in references.values())
        against = f" against {sources}" if sources else ""
        sampler = f"{sampling.sampler} " if sampling.sampler else ""
        console.note(
            f"would measure {measures} of {', '.join(plan.name for plan in plans)}{against}: "
            f"{settings.num} images, {settings.repeats} repeats, {sampler}{sampling.steps} steps"
        )
        return Evaluation({plan.name: plan.kind for plan in plans})

    progress(Step(label="loading the libraries and the models"))
    from deme_cli.evaluation.measure import measure_rows, open_metrics, summarise

    place = world.device or device
    rows = open_rows(
        plans, sampling, prompts=prompts, needs_prompts=settings.clip_score,
        run=run, pipeline=run.pipeline(pipeline), device=place, dtype=dtype,
    )  # fmt: skip
    for text in (*warnings, *compare_rows(rows, settings, features)):
        console.warn(text)
    metrics = open_metrics(features, references, clip, rows[0].shape, settings, place, progress)
    seeds = [settings.seed + repeat for repeat in range(settings.repeats)]
    cards = {
        row.name: evaluation_card(
            row.card, metrics.card, named, seeds=seeds if row.finished is None else []
        )
        for row in rows
    }
    measured = measure_rows(
        rows, metrics, cards, settings, sampling, compile=compile, progress=progress
    )
    if not world.is_first:
        return None
    distance = features.name_of("fid") if features is not None and settings.fid else None
    return Evaluation({row.name: row.kind for row in rows}, summarise(measured), cards, distance)


def _find_features(
    run: RunFile, settings: EvalConfig, weights_path: Path | None, progress: Progress
) -> tuple[FeatureWeights | None, dict[str, Reference]]:
    """The features of the distances that are asked for, and the references by metric."""
    asked = {name: getattr(settings, name) for name in DISTANCES}
    sources = {metric: run.seen(source) for metric, source in asked.items() if source}
    if not sources and not settings.clip_score:
        raise ConfigError(
            "nothing to measure: add --fid, --kid or --prc REF, as in --fid digits, or --clip-score"
        )
    if not sources and weights_path is not None:
        raise ConfigError(
            "--weights goes with --fid, --kid or --prc; those of CLIP are --clip-weights"
        )
    if not sources:
        return None, {}
    features, resize = choose_features(settings.features, [*sources.values()]), settings.resize
    assets = weights_assets(features, resize, weights_path)
    for metric, source in sources.items():
        published = reference_assets(source, features, resize, needs_images=metric != "fid")
        if not published:  # what cannot be a reference is told before missing weights
            find_reference(source, features, resize, needs_images=metric != "fid")
        assets += published
    fetch(assets, progress)
    weights, references = find_weights(features, resize, weights_path), {}
    for metric, source in sources.items():
        references[weights.name_of(metric)] = find_reference(
            source, features, resize, weights=weights, needs_images=metric != "fid"
        )
    return weights, references
