"""The Typer app: every subcommand, grouped as they are used. Imports no heavy library."""

from __future__ import annotations

from typing import Annotated

import typer

from deme_cli import __version__
from deme_cli.commands.demo import demo
from deme_cli.commands.doctor import doctor
from deme_cli.commands.ensemble_sample import ensemble_sample
from deme_cli.commands.eval import evaluate
from deme_cli.commands.export import export
from deme_cli.commands.finetune import finetune
from deme_cli.commands.inspect import inspect
from deme_cli.commands.merge import merge
from deme_cli.commands.sample import sample
from deme_cli.commands.split import split
from deme_cli.commands.stats import stats
from deme_cli.commands.task_vector import task_vector

app = typer.Typer(
    name="deme",
    help="Decouple-then-Merge: one diffusion expert per range of timesteps, merged into one model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

PIPELINE, MEASURE, LOOK = "Pipeline", "Sample and measure", "Look and share"
for panel, name, command in (
    (PIPELINE, "split", split),
    (PIPELINE, "finetune", finetune),
    (PIPELINE, "task-vector", task_vector),
    (PIPELINE, "merge", merge),
    (MEASURE, "sample", sample),
    (MEASURE, "ensemble-sample", ensemble_sample),
    (MEASURE, "eval", evaluate),
    (MEASURE, "stats", stats),
    (LOOK, "demo", demo),
    (LOOK, "inspect", inspect),
    (LOOK, "export", export),
    (LOOK, "doctor", doctor),
):
    app.command(name, rich_help_panel=panel)(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"deme {__version__}")
        raise typer.Exit


@app.callback()
def deme(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    """Decouple-then-Merge: one diffusion expert per range of timesteps, merged into one model."""
