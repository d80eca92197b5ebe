"""`evaluate`: figures of models, ensembles and samples, a row each, under one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.eval_request import Order, Request, find_request
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import GateError
from deme_cli.evaluation.protocols import Protocol, apply_protocol, find_protocol
from deme_cli.run_file import AnySettings, RunFile

if TYPE_CHECKING:
    from deme_cli.evaluation.features import Extractor
    from deme_cli.evaluation.meters import Instruments
    from deme_cli.evaluation.rows import Row
    from deme_cli.evaluation.summary import Figure
    from deme_cli.evaluation.targets import Target

Figures = Mapping[str, "Mapping[str, Figure]"]  # by row and metric
Protocols = Mapping[str, Mapping[str, Any]]  # by row


@dataclass(frozen=True)
class Evaluation:
    """Figures by row and metric, what kind of row each is, and the protocol each was made under.

    distance: the name of the metric that `fid` asked for; None where none was.
    """

    figures: Figures
    kinds: Mapping[str, str]
    protocols: Protocols
    distance: str | None

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
        from deme_cli.evaluation.protocol import describe_cards

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
) -> Evaluation:
    """Measure images of models: distances to reference images, CLIP score, accuracy.

    models: artifacts, diffusers folders, hub ids, samples, folders of images; experts that cover
    all timesteps are one row. None: base, experts and merged of the run's folder.   settings,
    sampling: those of `run` if None; `settings` has the number of images and the first seed, and
    what its protocol fixes wins over the run's file and the defaults; to say otherwise here is an
    error, as it is on the command line.   weights: the file of the Inception or CLIP features.

    Rows of one repeat start from the same noise, so that differences to the first row are paired.
    Figures that are done are kept in the current folder until all are. Raises ConfigError,
    MissingError or ArtifactError before anything is drawn, NumericsError, Stopped.
    """
    run = run or RunFile()
    settings = settings or run.settings(EvalConfig)
    sampling = sampling or run.settings(SampleConfig)
    named = find_protocol(settings.protocol)
    settings = _under(named, settings, run)
    sampling = _under(named, replace(sampling, num=settings.num, seed=settings.seed), run)
    order = Order(run, settings, sampling, weights, named)
    evaluation = EvaluationJob(
        order, [str(model) for model in models], run.pipeline(pipeline), device, dtype, compile
    ).run()
    assert evaluation is not None, "a process that is alone is the first"
    return evaluation


def _under(named: Protocol | None, settings: AnySettings, run: RunFile) -> AnySettings:
    """The settings with what the protocol fixes. Raises ConfigError where they say otherwise, and
    neither the run's file nor the defaults do."""
    kind = type(settings)
    usual = asdict(kind()), asdict(run.settings(kind))
    given = {
        name: value
        for name, value in asdict(settings).items()
        if all(value != values[name] for values in usual)
    }
    return replace(settings, **apply_protocol(named, kind, given))


@dataclass(frozen=True)
class EvaluationJob:
    """Which rows are measured as `order` says, and by which processes."""

    order: Order
    models: Sequence[str]
    pipeline: str | None
    device: str
    dtype: str
    compile: str
    world: World = ALONE

    def open(self) -> Request:
        """Find the rows and what measures them, before torch is loaded."""
        order, world = self.order, self.world
        told = {**asdict(order.settings), **asdict(order.sampling)}
        world.require_same({"models": list(self.models), **told, "dtype": self.dtype})
        with world.first_before_others():
            return find_request(
                order, self.models, self.pipeline, world.device or self.device, self.dtype,
                self.compile,
            )  # fmt: skip

    def run(self, request: Request | None = None) -> Evaluation | None:
        """Measure all rows, with a bar; None in the other processes of a launch."""
        request = request or self.open()
        rows, figures, cards = _measure(request, self.world)
        if not self.world.is_first:
            return None
        features = request.means.features
        distance = features.metric_name if features is not None and request.config.fid else None
        return Evaluation(figures, {row.name: row.kind for row in rows}, cards, distance)


def _measure(request: Request, world: World) -> tuple[list[Row], Figures, Protocols]:
    """Measure all rows with a bar: the rows, their figures and their protocol cards.

    The first process of `world` has the figures.
    """
    config = request.config
    with console.waiting("loading the libraries and the models"):
        from deme_cli.evaluation.evaluate import evaluate_rows, total_images
        from deme_cli.evaluation.ledger import Ledger
        from deme_cli.evaluation.measure import Measured, seeds_of
        from deme_cli.evaluation.protocol import card_digest, evaluation_card
        from deme_cli.evaluation.rows import RowOpener, open_rows
        from deme_cli.evaluation.summary import summarise

        wants = ["text"] * config.clip_score + ["class"] * bool(config.accuracy)
        opener = RowOpener(
            request.sample, request.prompts, wants, request.pipeline, request.device, request.dtype
        )
        rows = open_rows(request.rows.plans, opener, config)
    _warn(request, rows)
    instruments = _open_instruments(request, rows[0].shape, world)
    references = {target.metric: target.reference for target in instruments.targets}
    means = request.means.counted(references)
    cards = {
        row.name: evaluation_card(row.card, means, seeds=seeds_of(row, config)) for row in rows
    }
    world.require_same({name: card_digest(card) for name, card in cards.items()})
    identity = [config.num, config.repeats, cards]
    ledger = Ledger(Path("."), identity) if world.is_first else None
    measured: list[Measured] = []
    shown = 0
    with console.progress("measuring", total_images(rows, config), "image") as bar:
        for record in evaluate_rows(
            rows, instruments, sample=request.sample, config=config, ledger=ledger,
            compile=request.compile, world=world,
        ):  # fmt: skip
            done = sum(finished.n for finished in measured) + record.done
            if isinstance(record, Measured):
                measured.append(record)
            if done > shown:
                shown = done
                bar.advance(done, f"{record.row}, repeat {record.repeat + 1}")
    return rows, summarise(measured) if measured else {}, cards


def _open_instruments(request: Request, shape: tuple[int, int, int], world: World) -> Instruments:
    """Load what measures, and look at the reference images. shape: (C, H, W) of the rows."""
    from deme_cli.evaluation.accuracy import open_classifier
    from deme_cli.evaluation.clip_score import open_clip_scorer
    from deme_cli.evaluation.features import open_extractor
    from deme_cli.evaluation.meters import Instruments

    means, device, size = request.means, request.device, request.config.batch_size
    extractor = clip = classifier = None
    if means.features:
        extractor = open_extractor(means.features, device=device, batch_size=size)
    targets = _open_targets(request, extractor, shape, world) if extractor else ()
    if means.clip:
        clip = open_clip_scorer(means.clip, device=device, batch_size=size)
    if means.classifier:
        classifier = open_classifier(means.classifier, device=device, batch_size=size)
    return Instruments(extractor, targets, clip, classifier)


def _open_targets(
    request: Request, extractor: Extractor, shape: tuple[int, int, int], world: World
) -> list[Target]:
    """The references' statistics and features, with a bar for their images."""
    from deme_cli.evaluation.targets import Target, open_target

    targets = []
    for metric, reference in request.means.references.items():
        with console.progress(f"reference {reference.source}", 1, "image") as bar:
            for record in open_target(metric, reference, extractor, shape, world=world):
                if isinstance(record, Target):
                    targets.append(record)
                else:
                    bar.advance(record.done, total=record.total)
    return targets


def _warn(request: Request, rows: list[Row]) -> None:
    """What makes figures hard to compare, told before the work; raises what must not be."""
    from deme_cli.evaluation.comparable import require_one_protocol
    from deme_cli.evaluation.measure import num_images

    config = request.config
    for text in request.rows.warnings:
        console.warn(text)
    features = request.means.features
    if features is not None and features.published is False:
        console.warn(
            f"{features.path}: not the published {features.name} weights (sha256 "
            f"{features.sha256[:12]}); figures cannot be compared with others'"
        )
    for row in rows:
        num = num_images(row, config)
        if (config.fid or config.kid) and num != config.num:
            console.warn(
                f"{row.name} has {num} images, not {config.num}: "
                f"fewer images make a distance larger"
            )
        if row.finished is not None and num < len(row.finished):
            console.warn(
                f"{row.name}: the first {num} of its {len(row.finished)} images are taken, "
                f"{row.finished.name(0)} to {row.finished.name(num - 1)}"
            )
    cards = {row.name: row.card for row in rows}
    counts = {row.name: num_images(row, config) for row in rows}
    for text in require_one_protocol(cards, counts, mixed=config.mixed):
        console.warn(text)
