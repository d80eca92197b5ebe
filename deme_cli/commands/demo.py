"""`deme demo`: the whole pipeline on the embedded digits, each step a real command line."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.options import command, flag
from deme_cli.config import FinetuneConfig, SampleConfig
from deme_cli.console import Step
from deme_cli.errors import ConfigError, writing
from deme_cli.run_file import read_run_file

NUM_RANGES = 4
EXPERTS = [f"ft_{index}of{NUM_RANGES}.safetensors" for index in range(1, NUM_RANGES + 1)]
MODELS = ("base", "control", "ensemble", "merged")
# How much the demo trains and draws; `quick` only shows that the commands run.
FULL = {"steps": 400, "candidates": 500, "num": 2000, "repeats": 3, "buckets": 50, "draws": 128}
QUICK = {"steps": 4, "candidates": 20, "num": 80, "repeats": 3, "buckets": 8, "draws": 4}
# The paper's method has a consistency loss, which the settings of the digits leave out.
FULL_METHOD = "with one of weight 1, as in the paper: ensemble 2.36, merged 2.72"


@command()
def demo(
    context: typer.Context,
    output: Annotated[Path, flag("--output -o", "Folder to make and work in.")] = Path("deme-demo"),
    quick: Annotated[
        bool, flag("--quick", "A trial run in a minute; its figures mean nothing.")
    ] = False,
    force: Annotated[
        bool, flag("--force", "Work in a folder that exists, replacing its files.")
    ] = False,
    as_json: bool = False,
) -> None:
    """Split, finetune, merge and measure the embedded digits model; ends in a table and a picture.

    Example: deme demo
    """
    if output.exists() and not force:
        raise ConfigError(f"{output} exists; add --force to work in it, or choose another --output")
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with contextlib.chdir(output):
        rows = _pipeline(context, QUICK if quick else FULL)
    paths = [output / name for name in ("demo.png", "eval.json", "report.html")]
    minutes = (time.monotonic() - start) / 60
    console.note(f"done in {minutes:.1f} minutes; look at {paths[0]} and {paths[-1]}")
    console.result_paths(paths, as_json=as_json, rows=rows, minutes=minutes)


def _pipeline(context: typer.Context, size: dict[str, int]) -> list[dict[str, Any]]:
    """Run the commands in the current folder; returns the rows of the evaluation."""
    experts = " ".join(EXPERTS)
    models = f"base.safetensors control.safetensors {experts} merged.safetensors"

    def run(command: str, *, quiet: bool = False) -> None:
        """Print one `deme` command line and run it here, its results shown with the rest."""
        console.note(f"\n$ deme {command}")
        was_quiet = console.is_quiet()
        words = shlex.split(command) + (["--quiet"] if quiet or was_quiet else [])
        with contextlib.redirect_stdout(sys.stderr):
            context.find_root().command.main(args=words, prog_name="deme", standalone_mode=False)
        console.set_quiet(was_quiet)

    run(f"split digits -n {NUM_RANGES} --force")
    _train_experts_beside_control(size["steps"])
    run(f"task-vector {experts} --force")
    search = f"--search grid --objective fid --num {size['candidates']} --no-report"
    run(f"merge {experts} {search} --force")
    counts = f"--num {size['num']} --repeats {size['repeats']}"
    run(f"eval {models} --fid digits {counts} --output eval.json --force")
    for model in MODELS:
        drawn = (
            f"ensemble-sample {experts}" if model == "ensemble" else f"sample {model}.safetensors"
        )
        run(f"{drawn} -n 24 -o {model}-samples.safetensors --force", quiet=True)
    run(f"analyze losses {models} --buckets {size['buckets']} --num {size['draws']} --force")
    rows = json.loads(Path("eval.json").read_text())["rows"]
    _draw(rows, size)
    run("report --force")
    return rows


def _train_experts_beside_control(steps: int) -> None:
    """The four experts in one process, plain finetuning with as many updates in another."""
    from deme_cli.jobs import RangeProcess, run_jobs
    from deme_cli.training.setup import metrics_path

    total = NUM_RANGES * steps
    commands = {
        "experts": f"finetune --range all --steps {steps} --force",
        "control": f"finetune --range 1/1 --p 0 --consistency 0 --projection none --steps {total} "
        f"-o control.safetensors --force",
    }
    outputs = {"experts": EXPERTS, "control": ["control.safetensors"]}
    processes = []
    for label, line in commands.items():
        console.note(f"\n$ deme {line}      # {label}, both at once")
        curves = [metrics_path(Path(name)) for name in outputs[label]]
        for curve in curves:
            curve.unlink(missing_ok=True)
        processes.append(RangeProcess(label, [*shlex.split(line), "--quiet"], curves))
    with console.showing() as progress:
        for done in run_jobs(processes, at_once=len(processes)):
            detail = "  ".join(f"{label} {step}" for label, step in done.items())
            progress(Step(sum(done.values()), 2 * total, "finetune", "update", detail=detail))


def _draw(rows: list[dict[str, Any]], size: dict[str, int]) -> None:
    """The held-out losses by range, as a table, and the picture of everything."""
    from deme_cli.analysis.figure import DemoRow, draw_demo

    document = json.loads(Path("losses.json").read_text())
    losses = {model["name"]: model["loss_by_range"] for model in document["models"]}
    bases = losses["base"]
    console.table(
        "Held-out loss by range (change against the base)",
        ["model", *document["ranges"]],
        [
            [name, *(f"{x:.5f} {x / base - 1:+.1%}" for x, base in zip(values, bases, strict=True))]
            for name, values in losses.items()
        ],
    )
    run = read_run_file(None)
    training, drawing = run.settings(FinetuneConfig), run.settings(SampleConfig)
    protocol = (
        f"{NUM_RANGES} experts of {size['steps']} updates, control {NUM_RANGES * size['steps']}; "
        f"lr {training.lr:g}, p {training.p:g}, no consistency loss"
        f"{f' ({FULL_METHOD})' if size is FULL else ''}\n"
        f"Fréchet distance on digit features, not FID: {size['num']} images x {size['repeats']} "
        f"seeds shared by all rows, DDIM with {drawing.steps} steps; coefficients chosen on "
        f"another seed against the training images"
    )
    console.note(f"protocol: {protocol}")
    metric = "frechet_digits"
    shown = [
        DemoRow(
            model, Path(f"{model}-samples.safetensors"), tuple(row["metrics"][metric]["values"]),
            tuple(losses[model]),
        )
        for model, row in zip(MODELS, rows, strict=True)
    ]  # fmt: skip
    draw_demo(shown, document["ranges"], Path("demo.png"), metric=metric, protocol=protocol)
