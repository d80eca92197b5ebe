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
from deme_cli.config import EvalConfig
from deme_cli.errors import ConfigError
from deme_cli.outputs import require_output, write_whole

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

    Rows of one repeat start from the same noise; differences to the first row
    are paired. Processes of one launch (torchrun, accelerate launch, srun)
    share the images.

    Example: deme eval base.safetensors merged.safetensors --fid digits -n 2000 --repeats 3
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    options = {
        "protocol": protocol, "fid": fid, "kid": kid, "clip_score": clip_score,
        "clip_model": clip_model, "clip_weights": clip_weights, "accuracy": accuracy,
        "mixed": mixed, "num": num, "repeats": repeats, "features": features, "resize": resize,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    of_sampling = {
        "sampler": sampler, "steps": steps, "eta": eta, "spacing": spacing, "guidance": guidance,
        "prompts": prompts, "prompt_column": prompt_column, "per_prompt": per_prompt,
        "classes": classes, "resolution": resolution, "resize": resize_to,
        "batch_size": batch_size,
    }  # fmt: skip
    order = resolve_order(run, options, of_sampling, weights)
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
