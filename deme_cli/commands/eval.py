"""`deme eval`: one table of figures, a row per model, ensemble or set of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.api.eval_request import resolve_order
from deme_cli.api.evaluating import Evaluation, EvaluationJob
from deme_cli.commands.eval_table import show
from deme_cli.commands.launching import meet
from deme_cli.commands.options import (
    Compile,
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Given,
    Json,
    OptionsOf,
    Pipeline,
    Quiet,
    begin,
    takes_settings,
)
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.files import require_output, write_whole


@takes_settings
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
    *,
    given: Annotated[Given, OptionsOf(EvalConfig, without=("batch_size",))],
    of_sampling: Annotated[Given, OptionsOf(SampleConfig, without=("num", "batch_size", "seed"))],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", help="File of the Inception or CLIP features.", show_default=False
        ),
    ] = None,
    max_fid: Annotated[
        float | None,
        typer.Option("--max-fid", help="Largest distance allowed; exit code 6 if a row has more."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            help="Images denoised, and images looked at, per forward; does not change the images.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the JSON document to a file, too."),
    ] = None,
    pipeline: Pipeline = None,
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

    Rows of one repeat start from the same noise; differences to the first row
    are paired. Processes of one launch (torchrun, accelerate launch, srun)
    share the images.

    Example: deme eval base.safetensors merged.safetensors --fid digits -n 2000 --repeats 3
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    size = {"batch_size": batch_size}
    order = resolve_order(run, {**given, **size}, {**of_sampling, **size}, weights)
    if max_fid is not None and not order.settings.fid:
        raise ConfigError("--max-fid needs --fid")
    if output is not None and world.is_first:
        require_output(output, force=force)
    job = EvaluationJob(
        order, models or [], run.pipeline(pipeline), world.device or device, dtype, compile, world
    )
    request = job.open()
    if dry_run:
        request.say_what_would_run()
        if as_json:
            rows = [{"name": plan.name} for plan in request.rows.plans]
            told = request.means.protocol
            console.result_json({"dry_run": True, "rows": rows, "protocol": told})
        return
    if measured := job.run(request):
        _tell(measured, output, as_json=as_json)
        if max_fid is not None:
            measured.require_at_most(max_fid)
    world.wait()  # nobody ends well where the gate does not open


def _tell(measured: Evaluation, output: Path | None, *, as_json: bool) -> None:
    """The table on stderr, the document to stdout, to `output`, or both."""
    show(measured)
    document = measured.document
    if output is not None:
        text = json.dumps({"schema_version": console.SCHEMA_VERSION, **document}, indent=2)
        write_whole(output, [text.encode(), b"\n"])
    if as_json:
        console.result_json(document)
    elif output is not None:
        console.result_paths([output], as_json=False)
