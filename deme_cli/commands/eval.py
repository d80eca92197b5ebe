"""`deme eval`: one table of figures, a row per model, ensemble or set of samples."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.launching import meet
from deme_cli.commands.options import (
    Compile,
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Pipeline,
    Quiet,
    begin,
    option,
)
from deme_cli.commands.sample import (
    Classes,
    Eta,
    Guidance,
    PerPrompt,
    PromptColumn,
    Prompts,
    ResizeTo,
    Resolution,
    Sampler,
    Spacing,
    Steps,
)
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.outputs import require_output, write_whole
from deme_cli.processes import World

if TYPE_CHECKING:
    from deme_cli.commands.eval_request import Request
    from deme_cli.commands.eval_table import Cards, Figures
    from deme_cli.evaluation.features import Extractor
    from deme_cli.evaluation.meters import Instruments
    from deme_cli.evaluation.rows import Row
    from deme_cli.evaluation.targets import Target

_C = EvalConfig


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|EXPERT|SAMPLES",
            help="Artifacts, diffusers folders, hub ids, folders of images. Experts that cover all "
            "timesteps are one row. Without any: base, experts and merged of this folder.",
            show_default=False,
        ),
    ] = None,
    fid: Annotated[str | None, option(_C, "fid", "--fid")] = None,
    kid: Annotated[str | None, option(_C, "kid", "--kid")] = None,
    clip_score: Annotated[bool | None, option(_C, "clip_score", "--clip-score")] = None,
    accuracy: Annotated[str | None, option(_C, "accuracy", "--accuracy")] = None,
    protocol: Annotated[str | None, option(_C, "protocol", "--protocol")] = None,
    num: Annotated[int | None, option(_C, "num", "-n", "--num")] = None,
    repeats: Annotated[int | None, option(_C, "repeats", "--repeats")] = None,
    features: Annotated[str | None, option(_C, "features", "--features")] = None,
    resize: Annotated[str | None, option(_C, "resize", "--resize")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", help="File of the Inception or CLIP features.", show_default=False
        ),
    ] = None,
    clip_model: Annotated[str | None, option(_C, "clip_model", "--clip-model")] = None,
    clip_weights: Annotated[str | None, option(_C, "clip_weights", "--clip-weights")] = None,
    mixed: Annotated[bool | None, option(_C, "mixed", "--mixed")] = None,
    max_fid: Annotated[
        float | None,
        typer.Option("--max-fid", help="Largest distance allowed; exit code 6 if a row has more."),
    ] = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    prompt_column: PromptColumn = None,
    per_prompt: PerPrompt = None,
    classes: Classes = None,
    resolution: Resolution = None,
    resize_to: ResizeTo = None,
    pipeline: Pipeline = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            help="Images denoised, and images looked at, per forward; does not change the images.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, option(_C, "seed", "--seed")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the JSON document to a file, too."),
    ] = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile: Compile = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure images of models: distances to reference images, CLIP score, accuracy.

    Rows of one repeat start from the same noise; differences to the first row are paired.
    Processes of one launch (torchrun, accelerate launch, srun) share the images.

    Example: deme eval base.safetensors merged.safetensors --fid digits -n 2000 --repeats 3
    """
    from deme_cli.commands.eval_request import (
        Request,
        check_options,
        find_means,
        find_prompts,
        find_rows,
        say_what_would_run,
    )
    from deme_cli.commands.eval_table import document_of, require_gate, show
    from deme_cli.evaluation.protocols import apply_protocol, find_protocol

    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    named = find_protocol(run.settings(EvalConfig, protocol=protocol).protocol)
    given = {
        "protocol": protocol, "fid": fid, "kid": kid, "clip_score": clip_score,
        "clip_model": clip_model, "clip_weights": clip_weights, "accuracy": accuracy,
        "mixed": mixed, "num": num, "repeats": repeats, "features": features, "resize": resize,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    given = apply_protocol(named, EvalConfig, given)
    settings = run.settings(EvalConfig, **given)
    options = {
        "sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing, "guidance": guidance,
        "prompts": prompts, "prompt_column": prompt_column, "per_prompt": per_prompt,
        "classes": classes, "resolution": resolution, "resize": resize_to,
        "batch_size": batch_size, "num": settings.num, "seed": settings.seed,
    }  # fmt: skip
    sample = run.settings(SampleConfig, **apply_protocol(named, SampleConfig, options))
    world.require_same({"models": models, **asdict(settings), **asdict(sample), "dtype": dtype})
    check_options(settings, named, max_fid=max_fid, weights=weights)
    if output is not None and world.is_first:
        require_output(output, force=force)
    if named is not None:
        console.note(f"protocol {named.name}: {named.source}")
        console.note(f"not told there: {named.open}")
    with world.first_before_others():
        chosen, settings, sample = find_prompts(run, settings, sample, given["num"])
        rows = find_rows(run, models or [])
        means = find_means(run, settings, weights, named)
    parts = run.pipeline(pipeline)
    request = Request(
        settings, sample, means, rows, chosen, parts, world.device or device, dtype, compile
    )
    if dry_run:
        say_what_would_run(request, as_json=as_json)
        return
    measured, figures, cards = _measure(request, world)
    if world.is_first:
        show(figures, cards)
        document = document_of(figures, {row.name: row.kind for row in measured}, cards)
        if output is not None:
            text = json.dumps({"schema_version": console.SCHEMA_VERSION, **document}, indent=2)
            write_whole(output, [text.encode(), b"\n"])
        if as_json:
            console.result_json(document)
        elif output is not None:
            console.result_paths([output], as_json=False)
        if means.features is not None:
            require_gate(figures, means.features.metric_name, max_fid)
    world.wait()  # nobody ends well where the gate does not open


def _measure(request: Request, world: World) -> tuple[list[Row], Figures, Cards]:
    """Measure all rows with a bar: the rows, their figures and their protocol cards.

    The first process of `world` has the figures.
    """
    from deme_cli.evaluation.evaluate import evaluate_rows, total_images
    from deme_cli.evaluation.ledger import Ledger
    from deme_cli.evaluation.measure import Measured, seeds_of
    from deme_cli.evaluation.protocol import card_digest, evaluation_card
    from deme_cli.evaluation.rows import RowOpener, open_rows
    from deme_cli.evaluation.summary import summarise

    config = request.config
    opener = RowOpener(
        request.sample, request.prompts, request.pipeline, request.device, request.dtype
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

    means = request.means
    place = {"device": request.device, "batch_size": request.config.batch_size}
    extractor = open_extractor(means.features, **place) if means.features else None
    return Instruments(
        extractor,
        _open_targets(request, extractor, shape, world) if extractor else (),
        open_clip_scorer(means.clip, **place) if means.clip else None,
        open_classifier(means.classifier, **place) if means.classifier else None,
    )


def _open_targets(
    request: Request, extractor: Extractor, shape: tuple[int, int, int], world: World
) -> list[Target]:
    """The references' statistics and features, with a bar for their images."""
    from deme_cli.evaluation.targets import Target, open_target

    targets = []
    for metric, reference in request.means.references.items():
        with console.progress(f"reference {reference.source}", 100, "%") as bar:
            for record in open_target(metric, reference, extractor, shape, world=world):
                if isinstance(record, Target):
                    targets.append(record)
                else:
                    bar.advance(100 * record.done // record.total)
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
        measures_distance = bool(config.fid or config.kid)
        if measures_distance and row.finished is not None and len(row.finished) < config.num:
            console.warn(
                f"{row.name} has {len(row.finished)} images, not {config.num}: "
                f"fewer images make a distance larger"
            )
    cards = {row.name: row.card for row in rows}
    counts = {row.name: num_images(row, config) for row in rows}
    for text in require_one_protocol(cards, counts, mixed=config.mixed):
        console.warn(text)
