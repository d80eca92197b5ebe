"""`deme analyze`: the paper's figures for any model, each with the numbers behind it.

Each analysis is a subcommand, a function of this file: it writes a JSON file, and a picture of it
beside. What it does lies in analysis/.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import deme_cli
from deme_cli import console
from deme_cli.analysis.settings import (
    SPLITS,
    ActivationConfig,
    GradientConfig,
    LandscapeConfig,
    LossConfig,
)
from deme_cli.commands.options import (
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
    option,
    takes_settings,
)
from deme_cli.config import AFFINITY_NAME, DataConfig, SplitConfig
from deme_cli.console import Progress
from deme_cli.errors import ConfigError

if TYPE_CHECKING:
    from deme_cli import Analysis


def _argument(text: str, metavar: str = "MODEL") -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def _option(flag: str, text: str) -> Any:
    return typer.Option(*flag.split(), help=text, show_default=False)


Data = Annotated[str | None, option(DataConfig, "source")]
Split = Annotated[str, typer.Option("--split", help=f"Which of the images: {', '.join(SPLITS)}.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="JSON file; a picture goes beside it.")
]
NumRanges = Annotated[int | None, _option(
    "-n --num-ranges",
    r"Equal ranges to tell apart \[default: those of the split or of the experts].",
)]  # fmt: skip


def analyze() -> None:
    """Draw why it works: where timesteps conflict, what experts changed, where losses fell.

    Example: deme analyze losses
    """


@takes_settings
def losses(
    given: Annotated[Given, OptionsOf(LossConfig)],
    models: Annotated[list[str] | None, _argument(
        r"Artifacts, diffusers folders or hub ids; the others are compared with the first "
        r"\[default: base, experts and merged of this folder]."
    )] = None,
    data: Data = None, split: Split = "held-out", n: NumRanges = None,
    output: Output = Path("losses.json"), pipeline: Pipeline = None, config: ConfigPath = None,
    device: Device = "auto", dtype: Dtype = "fp32", force: Force = False, dry_run: DryRun = False,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Show where on [0, T) each model gained on the base, and where it lost. Look at this first.

    Example: deme analyze losses base.safetensors ft_*.safetensors merged.safetensors
    """
    run = begin(config, quiet=quiet)
    _show(lambda progress: deme_cli.analyze_losses(
        models or (), run.settings(LossConfig, **given), split=split, num_ranges=n, output=output,
        images=run.settings(DataConfig, source=data), run=run, pipeline=pipeline, device=device,
        dtype=dtype, force=force, dry_run=dry_run, progress=progress,
    ), as_json=as_json)  # fmt: skip


@takes_settings
def gradients(
    given: Annotated[Given, OptionsOf(GradientConfig)],
    model: Annotated[str | None, _argument(
        r"An artifact, a diffusers folder, a hub id or digits \[default: the base of deme.toml]."
    )] = None,
    data: Data = None, n: Annotated[int | None, option(SplitConfig, "n")] = None,
    output: Output = Path(AFFINITY_NAME), pipeline: Pipeline = None, config: ConfigPath = None,
    device: Device = "auto", force: Force = False, dry_run: DryRun = False, as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compare the gradients of timesteps by bucket; suggest ranges for `deme split --by gradient`.

    Example: deme analyze gradients --buckets 50
    """
    run = begin(config, quiet=quiet)
    _show(lambda progress: deme_cli.analyze_gradients(
        model, run.settings(GradientConfig, **given), num_ranges=n, output=output,
        images=run.settings(DataConfig, source=data), run=run, pipeline=pipeline, device=device,
        force=force, dry_run=dry_run, progress=progress,
    ), as_json=as_json)  # fmt: skip


@takes_settings
def activations(
    given: Annotated[Given, OptionsOf(ActivationConfig)],
    models: Annotated[list[str], _argument(
        "BASE and EXPERT, or EXPERT alone, whose base is found beside it or by deme.toml: "
        "artifacts, diffusers folders or hub ids."
    )],
    data: Data = None, split: Split = "held-out",
    range: Annotated[str | None, _option(
        "--range", r"Timesteps to look at: i/N, start:stop or all \[default: the expert's own].",
    )] = None,
    block: Annotated[str | None, _option(
        "--block", r"Block to draw maps of, as mid_block \[default: the one that changed most].",
    )] = None,
    output: Output = Path("activations.json"), pipeline: Pipeline = None, config: ConfigPath = None,
    device: Device = "auto", dtype: Dtype = "fp32", force: Force = False, dry_run: DryRun = False,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Show whether finetuning changed the features' channels or places more than chance would.

    Example: deme analyze activations base.safetensors ft_1of4.safetensors
    """
    run = begin(config, quiet=quiet)
    *base, expert = models
    if len(base) > 1:
        raise ConfigError(f"{len(models)} models given: expected [BASE] EXPERT")
    _show(lambda progress: deme_cli.analyze_activations(
        expert, run.settings(ActivationConfig, **given), base=base[0] if base else None,
        images=run.settings(DataConfig, source=data), split=split, range=range, block=block,
        output=output, run=run, pipeline=pipeline, device=device, dtype=dtype, force=force,
        dry_run=dry_run, progress=progress,
    ), as_json=as_json)  # fmt: skip


def task_vectors(
    experts: Annotated[list[Path] | None, _argument(
        r"Experts or task vectors of one base \[default: ft_* beside that of deme.toml].",
        metavar="EXPERT|VECTOR...",
    )] = None,
    base: Annotated[Path | None, _option(
        "--base",
        r"The base they were finetuned from \[default: that of deme.toml, or beside them].",
    )] = None,
    output: Output = Path("task-vectors.json"), config: ConfigPath = None, force: Force = False,
    dry_run: DryRun = False, as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Show how far each expert moved in each layer, and where experts pull against each other.

    Example: deme analyze task-vectors ft_*.safetensors
    """
    run = begin(config, quiet=quiet)
    _show(lambda progress: deme_cli.analyze_task_vectors(
        experts or (), base=base, output=output, run=run, force=force, dry_run=dry_run,
        progress=progress,
    ), as_json=as_json)  # fmt: skip


@takes_settings
def landscape(
    given: Annotated[Given, OptionsOf(LandscapeConfig)],
    models: Annotated[list[str] | None, _argument(
        r"One model, for random directions around it, or the origin and two finetuned from it "
        r"\[default: the base of deme.toml]."
    )] = None,
    mark: Annotated[list[str] | None, _option(
        "--mark", "A model to show where it lies on the plane; repeatable."
    )] = None,
    data: Data = None, split: Split = "train", n: NumRanges = None,
    output: Output = Path("landscape.json"), pipeline: Pipeline = None, config: ConfigPath = None,
    device: Device = "auto", force: Force = False, dry_run: DryRun = False, as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Draw the loss over a plane of weights, of all timesteps and by range.

    Example: deme analyze landscape base.safetensors ft_1of4.safetensors ft_4of4.safetensors
    """
    run = begin(config, quiet=quiet)
    _show(lambda progress: deme_cli.analyze_landscape(
        models or (), run.settings(LandscapeConfig, **given), marks=mark or (), split=split,
        images=run.settings(DataConfig, source=data), num_ranges=n, output=output, run=run,
        pipeline=pipeline, device=device, force=force, dry_run=dry_run, progress=progress,
    ), as_json=as_json)  # fmt: skip


def _show(analysis: Callable[[Progress], Analysis], *, as_json: bool) -> None:
    with console.showing() as progress:
        made = analysis(progress)
    if made.document:
        console.table(made.reading, made.columns, made.rows)
    console.result_paths(made.paths, as_json=as_json, **made.facts)
