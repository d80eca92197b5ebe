"""`evaluate`: figures of models, ensembles and samples, a row each, under one protocol.

First everything is found and checked without torch: prompts, rows, references, the files of the
networks. Then rows and networks are opened, the cards of the rows are compared, and measure.py
draws and looks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.config import EVAL_NUM, EvalConfig, SampleConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.data.prompts import PromptSet, prompt_assets, read_prompts, select_prompts
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ConfigError, GateError
from deme_cli.evaluation.protocols import (
    Protocol,
    describe_cards,
    evaluation_card,
    find_protocol,
    require_one_protocol,
    require_reference,
    under_protocol,
)
from deme_cli.evaluation.references import Reference, find_reference, reference_assets
from deme_cli.evaluation.rows import folder_rows, open_rows, plan_rows
from deme_cli.evaluation.weights import (
    FeatureWeights,
    choose_features,
    find_weights,
    weights_assets,
)
from deme_cli.fetch import fetch
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.evaluation.clip_score import ClipWeights
    from deme_cli.evaluation.measure import Figure, Metrics
    from deme_cli.evaluation.rows import Row


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
        return {
            "rows": [
                {
                    "name": name,
                    "kind": self.kinds[name],
                    "metrics": {metric: figure.document for metric, figure in row.items()},
                    "protocol": self.protocols[name],
                }
                for name, row in self.figures.items()
            ]
        }

    def remarks(self) -> Sequence[str]:
        """What the figures depend on, a line each."""
        return describe_cards(self.protocols)

    def require_at_most(self, max_fid: float) -> None:
        """Raises GateError if a row's distance is above the one allowed."""
        assert self.distance is not None, "without fid there is no distance"
        above = [
            f"{name} {row[self.distance].value:.4g}"
            for name, row in self.figures.items()
            if row[self.distance].value > max_fid
        ]
        if above:
            raise GateError(f"{self.distance} above --max-fid {max_fid:g}: {', '.join(above)}")


def evaluate(
    models: Sequence[str | Path] = (),
    settings: EvalConfig | None = None,
    *,
    sampling: SampleConfig | None = None,
    weights: Path | None = None,
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    compile: str = "auto",
    dry_run: bool = False,
    world: World = ALONE,
    progress: Progress = silent,
) -> Evaluation | None:
    """Measure images of models: distances to reference images, CLIP score.

    models: artifacts, diffusers folders, hub ids, samples, folders of images; experts that cover
    all timesteps are one row. None: base, experts and merged of the run's folder.   settings,
    sampling: those of `run` if None; `settings` has the number of images and the first seed, and
    what its protocol fixes wins over the run's file and the defaults; to say otherwise here is an
    error, as it is on the command line.   weights: the file of the Inception or CLIP features.
    dry_run: check all, measure nothing; the kinds of the rows come back.   progress: is told
    how far it is.

    Rows of one repeat start from the same noise, so that differences to the first row are paired.
    Figures that are done are kept in the current folder until all are. Returns None in all but the
    first process of a launch. Raises ConfigError, MissingError or ArtifactError before anything is
    drawn, NumericsError, Stopped.
    """
    run = run or RunFile()
    settings = settings or run.settings(EvalConfig)
    sampling = sampling or run.settings(SampleConfig)
    named = find_protocol(settings.protocol)
    settings = under_protocol(named, settings, run)
    sampling = replace(sampling, num=settings.num, seed=settings.seed)
    sampling = under_protocol(named, sampling, run)
    world.require_same({
        "models": list(map(str, models)), **asdict(settings), **asdict(sampling), "dtype": dtype,
    })  # fmt: skip
    with world.first_before_others():
        _require_sense(settings, named, weights)
        prompts, settings, sampling = find_prompts(run, settings, sampling, progress)
        plans, warnings = plan_rows(list(map(str, models))) if models else folder_rows(run.base)
        features, references = _find_features(run, settings, weights, progress)
        clip = _find_clip(run, settings) if settings.clip_score else None
    if dry_run:
        against = ", ".join(reference.source for reference in references.values())
        sampler = f"{sampling.sampler} " if sampling.sampler else ""
        console.note(
            f"would measure {', '.join([*references, *(['clip_score'] if clip else [])])} of "
            f"{', '.join(plan.name for plan in plans)}{f' against {against}' if against else ''}: "
            f"{settings.num} images, {settings.repeats} repeats, {sampler}{sampling.steps} steps"
        )
        return Evaluation({plan.name: plan.kind for plan in plans})

    progress(Step(label="loading the libraries and the models"))
    from deme_cli.evaluation.measure import seeds_of

    place = world.device or device
    rows = open_rows(
        plans, sampling, prompts=prompts, needs_prompts=settings.clip_score,
        pipeline=run.pipeline(pipeline), device=place, dtype=dtype,
    )  # fmt: skip
    for text in (*warnings, *_warnings(rows, settings, features)):
        console.warn(text)
    metrics = _open_metrics(
        features, references, clip, rows[0].shape, settings, place, world, progress
    )
    cards = {
        row.name: evaluation_card(row.card, metrics.card, named, seeds=seeds_of(row, settings))
        for row in rows
    }
    figures = _measure(rows, metrics, cards, settings, sampling, compile, world, progress)
    if not world.is_first:
        return None
    distance = features.metric_name if features is not None and settings.fid else None
    return Evaluation({row.name: row.kind for row in rows}, figures, cards, distance)


def _require_sense(settings: EvalConfig, named: Protocol | None, weights: Path | None) -> None:
    require_reference(named, settings.fid)
    if not (settings.fid or settings.kid or settings.clip_score):
        raise ConfigError(
            "nothing to measure: add --fid REF or --kid REF, as in --fid digits, or --clip-score"
        )
    if weights is not None and not (settings.fid or settings.kid):
        raise ConfigError("--weights goes with --fid or --kid; those of CLIP are --clip-weights")
    if named is not None:
        console.note(f"protocol {named.name}: {named.source}")
        console.note(f"not told there: {named.open}")


def find_prompts(
    run: RunFile,
    config: EvalConfig,
    sample: SampleConfig,
    progress: Progress = silent,
) -> tuple[PromptSet | None, EvalConfig, SampleConfig]:
    """The prompts that are asked for, and the settings with the number of images there will be.

    Raises ConfigError where the number that is set does not match the prompts.
    """
    if sample.prompts is None:
        count = EVAL_NUM if config.num is None else config.num
        return None, replace(config, num=count), replace(sample, num=count)
    source = run.seen(sample.prompts)
    fetch(prompt_assets(source), progress)
    prompts = read_prompts(source, column=sample.prompt_column)
    asked = EVAL_NUM if config.num is None and prompts.cycles else config.num
    count = len(select_prompts(prompts, num=asked, per_prompt=sample.per_prompt))
    sample = replace(sample, prompts=source, num=count)
    return prompts, replace(config, num=count), sample


def _find_features(
    run: RunFile,
    settings: EvalConfig,
    weights_path: Path | None,
    progress: Progress,
) -> tuple[FeatureWeights | None, dict[str, Reference]]:
    """The features of the distances that are asked for, and the references by metric."""
    fid, kid = (source and run.seen(source) for source in (settings.fid, settings.kid))
    named = [source for source in (fid, kid) if source]
    if not named:
        return None, {}
    features, resize = choose_features(settings.features, named), settings.resize
    for source in named:
        if Path(source).exists() or not reference_assets(source, features, resize):
            # what cannot be a reference is told before missing weights
            find_reference(source, features, resize)
    assets = weights_assets(features, resize, weights_path)
    fetch([*assets, *(reference_assets(fid, features, resize) if fid else [])], progress)
    weights = find_weights(features, resize, weights_path)
    references = {}
    if fid:
        references[weights.metric_name] = find_reference(fid, features, resize, weights=weights)
    if kid:
        references[weights.kernel_name] = find_reference(
            kid, features, resize, weights=weights, kernel=True
        )
    return weights, references


def _find_clip(run: RunFile, settings: EvalConfig) -> ClipWeights:
    """CLIP is looked up in open_clip, which loads torch: it comes last."""
    from deme_cli.evaluation.clip_score import find_clip

    return find_clip(settings.clip_model, run.seen(settings.clip_weights))


def _warnings(
    rows: Sequence[Row], config: EvalConfig, features: FeatureWeights | None
) -> list[str]:
    """What makes figures hard to compare, told before the work; raises what must not be."""
    from deme_cli.evaluation.measure import num_images

    told = []
    if features is not None and features.published is False:
        told.append(
            f"{features.path}: not the published {features.name} weights (sha256 "
            f"{features.sha256[:12]}); figures cannot be compared with others'"
        )
    counts = {row.name: num_images(row, config) for row in rows}
    for row in rows:
        num = counts[row.name]
        if features is not None and num != config.num:
            told.append(
                f"{row.name} has {num} images, not {config.num}: "
                f"fewer images make a distance larger"
            )
        if row.finished is not None and num < len(row.finished):
            told.append(
                f"{row.name}: the first {num} of its {len(row.finished)} images are taken, "
                f"{row.finished.name(0)} to {row.finished.name(num - 1)}"
            )
    cards = {row.name: row.card for row in rows}
    return told + require_one_protocol(cards, counts, mixed=config.mixed)


def _open_metrics(
    features: FeatureWeights | None,
    references: Mapping[str, Reference],
    clip: ClipWeights | None,
    shape: tuple[int, int, int],
    config: EvalConfig,
    device: str,
    world: World,
    progress: Progress,
) -> Metrics:
    """Load what measures, and look at the reference images. shape: (C, H, W) of the rows."""
    from deme_cli.evaluation.features import open_extractor
    from deme_cli.evaluation.measure import Metrics
    from deme_cli.evaluation.references import open_reference

    extractor = scorer = None
    opened = {}
    if features is not None:
        extractor = open_extractor(features, device=device, batch_size=config.batch_size)
        for metric, reference in references.items():
            opened[metric] = open_reference(
                reference, extractor, shape, kernel=metric == features.kernel_name,
                world=world, progress=progress,
            )  # fmt: skip
    if clip is not None:
        from deme_cli.evaluation.clip_score import open_clip_scorer

        scorer = open_clip_scorer(clip, device=device, batch_size=config.batch_size)
    return Metrics(extractor, opened, scorer)


def _measure(
    rows: Sequence[Row],
    metrics: Metrics,
    cards: Mapping[str, Mapping[str, Any]],
    config: EvalConfig,
    sample: SampleConfig,
    compile: str,
    world: World,
    progress: Progress,
) -> Mapping[str, Mapping[str, Figure]]:
    """The figures by row and metric; the first process of `world` has them."""
    from deme_cli.evaluation.measure import (
        Measured,
        Unfinished,
        measure_rows,
        summarise,
        total_images,
    )

    digests = {
        name: hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:12]
        for name, card in cards.items()
    }
    world.require_same(digests)
    identity = [config.num, config.repeats, cards]
    measured: list[Measured] = []
    total, shown = total_images(rows, config), 0
    for record in measure_rows(
        rows, metrics, sample=sample, config=config, compile=compile, world=world,
        unfinished=Unfinished(Path("."), identity) if world.is_first else None,
    ):  # fmt: skip
        done = sum(finished.n for finished in measured) + record.done
        if isinstance(record, Measured):
            measured.append(record)
        if done > shown:
            shown = done
            detail = f"{record.row}, repeat {record.repeat + 1}"
            progress(Step(done, total, "measuring", "image", detail=detail))
    return summarise(measured) if measured else {}
