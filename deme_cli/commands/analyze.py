"""`deme analyze`: the paper's figures for any model, each with the numbers behind it.

Each analysis is a subcommand, a function of this file: it writes a JSON file, and a picture of it
beside. What it does lies in analysis/.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.analysis.settings import (
    SPLITS,
    ActivationConfig,
    ForecastConfig,
    GradientConfig,
    LandscapeConfig,
    LossConfig,
)
from deme_cli.commands.options import Given, OptionsOf, argument, command, flag, option
from deme_cli.config import AFFINITY_NAME, DataConfig, SplitConfig
from deme_cli.console import Progress
from deme_cli.errors import ConfigError

Data = Annotated[str | None, option(DataConfig, "source")]
Split = Annotated[str, flag("--split", f"Which of the images: {', '.join(SPLITS)}.")]
Output = Annotated[Path, flag("--output -o", "JSON file; a picture goes beside it.")]
NumRanges = Annotated[int | None, flag(
    "-n --num-ranges", "Equal ranges to tell apart [default: those of the split or of the experts]."
)]  # fmt: skip


def analyze() -> None:
    """Draw why it works: where timesteps conflict, what experts changed, where losses fell.

    Example: deme analyze losses
    """


@command("pipeline config device dtype force dry_run")
def losses(
    given: Annotated[Given, OptionsOf(LossConfig)],
    common: Given,
    models: Annotated[list[str] | None, argument(
        "MODEL", "Artifacts, diffusers folders or hub ids; the others are compared with the first "
        "[default: base, experts and merged of this folder]."
    )] = None,
    data: Data = None, split: Split = "held-out", n: NumRanges = None,
    output: Output = Path("losses.json"), as_json: bool = False,
) -> None:  # fmt: skip
    """Show where on [0, T) each model gained on the base, and where it lost. Look at this first.

    Example: deme analyze losses base.safetensors ft_*.safetensors merged.safetensors
    """
    run = common["run"]
    _show(lambda progress: deme_cli.analyze_losses(
        models or (), run.settings(LossConfig, **given), split=split, num_ranges=n, output=output,
        images=run.settings(DataConfig, source=data), progress=progress, **common,
    ), as_json=as_json)  # fmt: skip


@command("pipeline config device dtype force dry_run")
def forecast(
    given: Annotated[Given, OptionsOf(ForecastConfig)],
    common: Given, data: Data = None, n: NumRanges = None,
    output: Output = Path("forecast.json"), as_json: bool = False,
) -> None:  # fmt: skip
    """Tell from short experts of deme.toml's base what experts could win, before you train.

    Example: deme analyze forecast --updates 100
    """
    run = common["run"]
    _show(lambda progress: deme_cli.analyze_forecast(
        run.settings(ForecastConfig, **given), num_ranges=n, output=output,
        images=run.settings(DataConfig, source=data), progress=progress, **common,
    ), as_json=as_json)  # fmt: skip


@command("pipeline config device force dry_run")
def gradients(
    given: Annotated[Given, OptionsOf(GradientConfig)],
    common: Given,
    model: Annotated[str | None, argument(
        "MODEL", "An artifact, a diffusers folder, a hub id or digits "
        "[default: the base of deme.toml]."
    )] = None,
    data: Data = None, n: Annotated[int | None, option(SplitConfig, "n")] = None,
    output: Output = Path(AFFINITY_NAME), as_json: bool = False,
) -> None:  # fmt: skip
    """Compare the gradients of timesteps by bucket; suggest ranges for `deme split --by gradient`.

    Example: deme analyze gradients --buckets 50
    """
    run = common["run"]
    _show(lambda progress: deme_cli.analyze_gradients(
        model, run.settings(GradientConfig, **given), num_ranges=n, output=output,
        images=run.settings(DataConfig, source=data), progress=progress, **common,
    ), as_json=as_json)  # fmt: skip


@command("pipeline config device dtype force dry_run")
def activations(
    given: Annotated[Given, OptionsOf(ActivationConfig)],
    common: Given,
    models: Annotated[list[str], argument(
        "MODEL", "BASE and EXPERT, or EXPERT alone, whose base is found beside it or by deme.toml: "
        "artifacts, diffusers folders or hub ids."
    )],
    data: Data = None, split: Split = "held-out",
    range: Annotated[str | None, flag(
        "--range", "Timesteps to look at: i/N, start:stop or all [default: the expert's own].",
    )] = None,
    block: Annotated[str | None, flag(
        "--block", "Block to draw maps of, as mid_block [default: the one that changed most].",
    )] = None,
    output: Output = Path("activations.json"), as_json: bool = False,
) -> None:  # fmt: skip
    """Show whether finetuning changed the features' channels or places more than chance would.

    Example: deme analyze activations base.safetensors ft_1of4.safetensors
    """
    run, (*base, expert) = common["run"], models
    if len(base) > 1:
        raise ConfigError(f"{len(models)} models given: expected [BASE] EXPERT")
    _show(lambda progress: deme_cli.analyze_activations(
        expert, run.settings(ActivationConfig, **given), base=base[0] if base else None,
        images=run.settings(DataConfig, source=data), split=split, range=range, block=block,
        output=output, progress=progress, **common,
    ), as_json=as_json)  # fmt: skip


@command("config force dry_run")
def task_vectors(
    common: Given,
    experts: Annotated[list[Path] | None, argument(
        "EXPERT|VECTOR...",
        "Experts or task vectors of one base [default: ft_* beside that of deme.toml].",
    )] = None,
    base: Annotated[Path | None, flag(
        "--base",
        "The base they were finetuned from [default: that of deme.toml, or beside them].",
    )] = None,
    output: Output = Path("task-vectors.json"), as_json: bool = False,
) -> None:  # fmt: skip
    """Show how far each expert moved in each layer, and where experts pull against each other.

    Example: deme analyze task-vectors ft_*.safetensors
    """
    _show(lambda progress: deme_cli.analyze_task_vectors(
        experts or (), base=base, output=output, progress=progress, **common
    ), as_json=as_json)  # fmt: skip


@command("pipeline config device force dry_run")
def landscape(
    given: Annotated[Given, OptionsOf(LandscapeConfig)],
    common: Given,
    models: Annotated[list[str] | None, argument(
        "MODEL", "One model, for random directions around it, or the origin and two finetuned from "
        "it [default: the base of deme.toml]."
    )] = None,
    mark: Annotated[list[str] | None, flag(
        "--mark", "A model to show where it lies on the plane; repeatable."
    )] = None,
    data: Data = None, split: Split = "train", n: NumRanges = None,
    output: Output = Path("landscape.json"), as_json: bool = False,
) -> None:  # fmt: skip
    """Draw the loss over a plane of weights, of all timesteps and by range.

    Example: deme analyze landscape base.safetensors ft_1of4.safetensors ft_4of4.safetensors
    """
    run = common["run"]
    _show(lambda progress: deme_cli.analyze_landscape(
        models or (), run.settings(LandscapeConfig, **given), marks=mark or (), split=split,
        images=run.settings(DataConfig, source=data), num_ranges=n, output=output,
        progress=progress, **common,
    ), as_json=as_json)  # fmt: skip


def _show(analysis: Callable[[Progress], deme_cli.Analysis], *, as_json: bool) -> None:
    with console.showing() as progress:
        made = analysis(progress)
    if made.document:
        console.table(made.reading, made.columns, made.rows)
    console.result_paths(made.paths, as_json=as_json, **made.facts)
