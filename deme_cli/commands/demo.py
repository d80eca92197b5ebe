"""`deme demo`: the whole pipeline on the embedded digits, each step a real command line."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.options import Json, Quiet
from deme_cli.config import FinetuneConfig, SampleConfig
from deme_cli.console import Step
from deme_cli.errors import ConfigError, MissingError
from deme_cli.run_file import read_run_file

NUM_RANGES = 4
EXPERTS = [f"ft_{index}of{NUM_RANGES}.safetensors" for index in range(1, NUM_RANGES + 1)]
MODELS = ("base", "control", "ensemble", "merged")


@dataclass(frozen=True)
class Size:
    """How much the demo trains and draws; `quick` only shows that the commands run."""

    steps: int
    candidates: int
    num: int
    repeats: int = 3
    buckets: int = 50
    draws: int = 128


# The paper's method has a consistency loss, which the settings of the digits leave out.
FULL_METHOD = "with one of weight 1, as in the paper: ensemble 2.36, merged 2.72"
FULL = Size(steps=400, candidates=500, num=2000)
QUICK = Size(steps=4, candidates=20, num=80, buckets=8, draws=4)


def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to make and work in.")
    ] = Path("deme-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A trial run in a minute; its figures mean nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Work in a folder that exists, replacing its files.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Split, finetune, merge and measure the embedded digits model; ends in a table and a picture.

    Example: deme demo
    """
    console.set_quiet(quiet)
    if output.exists() and not force:
        raise ConfigError(f"{output} exists; add --force to work in it, or choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingError(
            f"{output}: cannot make this folder ({error.strerror}); choose another --output"
        ) from error
    start, size = time.monotonic(), QUICK if quick else FULL
    before = Path.cwd()
    os.chdir(output)
    try:
        rows = _pipeline(context, size)
        paths = [output / name for name in ("demo.png", "eval.json", "report.html")]
    finally:
        os.chdir(before)
    minutes = (time.monotonic() - start) / 60
    console.note(f"done in {minutes:.1f} minutes; look at {paths[0]} and {paths[-1]}")
    console.result_paths(paths, as_json=as_json, rows=rows, minutes=minutes)


def _pipeline(context: typer.Context, size: Size) -> list[dict[str, Any]]:
    """Run the commands in the current folder; returns the rows of the evaluation."""
    experts = " ".join(EXPERTS)
    models = f"base.safetensors control.safetensors {experts} merged.safetensors"

    _run(context, f"split digits -n {NUM_RANGES} --force")
    _train_experts_beside_control(size)
    _run(context, f"task-vector {experts} --force")
    _run(
        context,
        f"merge {experts} --search grid --objective fid --num {size.candidates} "
        f"--no-report --force",
    )
    _run(
        context,
        f"eval {models} --fid digits --num {size.num} --repeats {size.repeats} "
        f"--output eval.json --force",
    )
    for model in MODELS:
        command = f"sample {model}.safetensors"
        if model == "ensemble":
            command = f"ensemble-sample {experts}"
        _run(context, f"{command} -n 24 -o {model}-samples.safetensors --force", quiet=True)
    _run(
        context,
        f"analyze losses {models} --buckets {size.buckets} --num {size.draws} --force",
    )
    rows = json.loads(Path("eval.json").read_text())["rows"]
    _draw(rows, size)
    _run(context, "report --force")
    return rows


def _show(command: str) -> None:
    console.note(f"\n$ deme {command}")


def _run(context: typer.Context, command: str, *, quiet: bool = False) -> None:
    """Print one `deme` command line and run it in this process, its results shown with the rest."""
    _show(command)
    words = shlex.split(command) + (["--quiet"] if quiet or console.is_quiet() else [])
    was_quiet = console.is_quiet()
    with contextlib.redirect_stdout(sys.stderr):
        context.find_root().command.main(args=words, prog_name="deme", standalone_mode=False)
    console.set_quiet(was_quiet)


def _train_experts_beside_control(size: Size) -> None:
    """The four experts in one process, plain finetuning with as many updates in another."""
    from deme_cli.jobs import RangeProcess, run_jobs
    from deme_cli.training.setup import metrics_path

    experts = f"finetune --range all --steps {size.steps} --force"
    control = (
        f"finetune --range 1/1 --p 0 --consistency 0 --projection none "
        f"--steps {NUM_RANGES * size.steps} -o control.safetensors --force"
    )
    _show(f"{experts}      # and beside it, as control:")
    _show(control)
    processes = [
        RangeProcess(label, [*shlex.split(command), "--quiet"], list(map(metrics_path, outputs)))
        for label, command, outputs in (
            ("experts", experts, [Path(name) for name in EXPERTS]),
            ("control", control, [Path("control.safetensors")]),
        )
    ]
    for curve in (curve for process in processes for curve in process.metrics):
        curve.unlink(missing_ok=True)
    total = 2 * NUM_RANGES * size.steps
    with console.showing() as progress:
        for steps in run_jobs(processes, at_once=len(processes)):
            detail = "  ".join(f"{label} {step}" for label, step in steps.items())
            progress(Step(sum(steps.values()), total, "finetune", "update", detail=detail))


def _draw(rows: list[dict[str, Any]], size: Size) -> None:
    """The held-out losses by range, as a table, and the picture of everything."""
    from deme_cli.analysis.figure import DemoRow, draw_demo

    document = json.loads(Path("losses.json").read_text())
    losses = {model["name"]: model["loss_by_range"] for model in document["models"]}
    console.table(
        "Held-out loss by range (change against the base)",
        ["model", *document["ranges"]],
        [
            [
                name,
                *(
                    f"{loss:.5f} {100 * (loss / base - 1):+.1f}%"
                    for loss, base in zip(values, losses["base"], strict=True)
                ),
            ]
            for name, values in losses.items()
        ],
    )
    metric = "frechet_digits"
    run = read_run_file(None)
    training, drawing = run.settings(FinetuneConfig), run.settings(SampleConfig)
    protocol = (
        f"{NUM_RANGES} experts of {size.steps} updates, control {NUM_RANGES * size.steps}; "
        f"lr {training.lr:g}, p {training.p:g}, no consistency loss"
        f"{f' ({FULL_METHOD})' if size is FULL else ''}\n"
        f"Fréchet distance on digit features, not FID: {size.num} images x {size.repeats} seeds "
        f"shared by all rows, DDIM with {drawing.steps} steps; coefficients chosen on another seed "
        f"against the training images"
    )
    console.note(f"protocol: {protocol}")
    summaries = [
        DemoRow(
            model,
            Path(f"{model}-samples.safetensors"),
            tuple(row["metrics"][metric]["values"]),
            tuple(losses[model]),
        )
        for model, row in zip(MODELS, rows, strict=True)
    ]
    draw_demo(summaries, document["ranges"], Path("demo.png"), metric=metric, protocol=protocol)
