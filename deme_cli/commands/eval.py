"""`deme eval`: one table of distances, a row per model, ensemble or set of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Quiet,
    begin,
    option,
)
from deme_cli.commands.sample import Eta, Sampler, Spacing, Steps
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.outputs import write_whole

if TYPE_CHECKING:
    from deme_cli.commands.eval_request import Request
    from deme_cli.commands.eval_table import Cards, Figures
    from deme_cli.evaluation.features import Extractor
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
    num: Annotated[int | None, option(_C, "num", "-n", "--num")] = None,
    repeats: Annotated[int | None, option(_C, "repeats", "--repeats")] = None,
    features: Annotated[str | None, option(_C, "features", "--features")] = None,
    resize: Annotated[str | None, option(_C, "resize", "--resize")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", help="File of the Inception or CLIP weights.", show_default=False
        ),
    ] = None,
    max_fid: Annotated[
        float | None,
        typer.Option("--max-fid", help="Largest distance allowed; exit code 6 if a row has more."),
    ] = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: Spacing = None,
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
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the distance between images of models and reference images.

    Rows of one repeat start from the same noise; differences to the first row are paired.

    Example: deme eval base.safetensors merged.safetensors --fid digits -n 2000 --repeats 3
    """
    from deme_cli.commands.eval_request import check_options, prepare, say_what_would_run
    from deme_cli.commands.eval_table import document_of, require_gate, show

    run = begin(config, quiet=quiet)
    settings = run.settings(
        EvalConfig, fid=fid, kid=kid, num=num, repeats=repeats, features=features, resize=resize,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    sample = run.settings(
        SampleConfig, sampler=sampler, steps=steps, eta=eta, spacing=spacing,
        batch_size=batch_size, num=settings.num, seed=settings.seed,
    )  # fmt: skip
    check_options(settings, max_fid, output, force=force)
    request = prepare(run, settings, sample, weights, models or [], device=device, dtype=dtype)
    if dry_run:
        say_what_would_run(request, as_json=as_json)
        return
    rows, figures, cards = _measure(request)
    show(figures, cards)
    document = document_of(figures, {row.name: row.kind for row in rows}, cards)
    if output is not None:
        text = json.dumps({"schema_version": console.SCHEMA_VERSION, **document}, indent=2)
        write_whole(output, [text.encode(), b"\n"])
    if as_json:
        console.result_json(document)
    elif output is not None:
        console.result_paths([output], as_json=False)
    require_gate(figures, request.weights.metric_name, max_fid)


def _measure(request: Request) -> tuple[list[Row], Figures, Cards]:
    """Measure all rows with a bar: the rows, their figures and their protocol cards."""
    from deme_cli.evaluation.evaluate import evaluate_rows, total_images
    from deme_cli.evaluation.features import open_extractor
    from deme_cli.evaluation.ledger import Ledger
    from deme_cli.evaluation.measure import Measured, seeds_of
    from deme_cli.evaluation.protocol import evaluation_card
    from deme_cli.evaluation.rows import open_rows
    from deme_cli.evaluation.summary import summarise

    config, weights = request.config, request.weights
    rows = open_rows(request.rows.plans, request.sample, device=request.device, dtype=request.dtype)
    _warn(request, rows)
    extractor = open_extractor(weights, device=request.device, batch_size=config.batch_size)
    targets = _open_targets(request, extractor, rows[0].shape)
    references = {target.metric: target.reference for target in targets}
    cards = {
        row.name: evaluation_card(row, weights, references, seeds=seeds_of(row, config))
        for row in rows
    }
    ledger = Ledger(Path("."), [config.num, config.repeats, cards])
    measured: list[Measured] = []
    shown = 0
    with console.progress("measuring", total_images(rows, config), "image") as bar:
        for record in evaluate_rows(
            rows, targets, extractor, sample=request.sample, config=config, ledger=ledger
        ):
            done = sum(finished.n for finished in measured) + record.done
            if isinstance(record, Measured):
                measured.append(record)
            if done > shown:
                shown = done
                bar.advance(done, f"{record.row}, repeat {record.repeat + 1}")
    return rows, summarise(measured), cards


def _open_targets(
    request: Request, extractor: Extractor, shape: tuple[int, int, int]
) -> list[Target]:
    """The references' statistics and features, with a bar for their images."""
    from deme_cli.evaluation.targets import Target, open_target

    targets = []
    for metric, reference in request.references.items():
        with console.progress(f"reference {reference.source}", 100, "%") as bar:
            for record in open_target(metric, reference, extractor, shape):
                if isinstance(record, Target):
                    targets.append(record)
                else:
                    bar.advance(100 * record.done // record.total)
    return targets


def _warn(request: Request, rows: list[Row]) -> None:
    """What makes figures hard to compare, told before the work."""
    for text in request.rows.warnings:
        console.warn(text)
    if request.weights.published is False:
        console.warn(
            f"{request.weights.path}: not the published {request.weights.name} weights (sha256 "
            f"{request.weights.sha256[:12]}); figures cannot be compared with others'"
        )
    for row in rows:
        if row.finished is not None and len(row.finished) < request.config.num:
            console.warn(
                f"{row.name} has {len(row.finished)} images, not {request.config.num}: "
                f"fewer images make a distance larger"
            )
