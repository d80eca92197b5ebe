"""`deme split`: import the base, divide [0, T), and write what every later command reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import (
    DryRun,
    Force,
    Given,
    Json,
    OptionsOf,
    Pipeline,
    Quiet,
    option,
    takes_settings,
)
from deme_cli.config import AFFINITY_NAME, CONFIG_NAME, DataConfig, ModelConfig, SplitConfig
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli import SplitResult

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", show_default=False,
                   help="digits, a diffusers folder, a hub id, or a base or merged artifact "
                        r"\[default: digits]."),
]  # fmt: skip
Data = Annotated[str | None, option(DataConfig, "source")]
Gradients = Annotated[
    Path | None,
    typer.Option("--gradients", show_default=False,
                 help="For --by gradient: what `deme analyze gradients` wrote "
                      rf"\[default: {AFFINITY_NAME} in the output folder]."),
]  # fmt: skip
Variant = Annotated[
    str | None,
    typer.Option("--variant", show_default=False,
                 help="Of a folder with several sets of weights: which, as fp16 or non_ema."),
]  # fmt: skip
Output = Annotated[
    Path, typer.Option("--output", "-o", help=f"Folder for {CONFIG_NAME} and {ModelConfig.base}.")
]


@takes_settings
def split(
    model: Model = None,
    *,
    given: Annotated[Given, OptionsOf(SplitConfig, ("n", "by"))],
    data: Data = None,
    gradients: Gradients = None,
    pipeline: Pipeline = None,
    variant: Variant = None,
    output: Output = Path("."),
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Import a pretrained model and divide its timesteps into ranges, one expert each.

    Example: deme split digits -n 4
    """
    import deme_cli as deme

    console.set_quiet(quiet)
    settings = RunFile().settings(SplitConfig, **given)
    with console.showing() as progress:
        progress(console.Step(label="loading the libraries and the model"))
        done = deme.split(
            model, settings, data=data, gradients=gradients, pipeline=pipeline, variant=variant,
            output=output, force=force, dry_run=dry_run,
        )  # fmt: skip
    _show(done)
    paths = [] if dry_run else [done.base, done.config]
    console.result_paths(paths, as_json=as_json, dry_run=dry_run, **done.facts)


def _show(done: SplitResult) -> None:
    """What was read, and the ranges with the signal-to-noise ratios at their ends."""
    record, facts, parts = done.record, done.facts, done.parts
    for assumed in facts["notes"]:
        console.warn(assumed)
    shape = " x ".join(map(str, facts["image_shape"]))
    if record.companions:
        shape += f", latents {' x '.join(map(str, facts['sample_shape']))}"
    console.note(
        f"{record.source}: {record.model_config['_class_name']}, "
        f"{facts['parameters']:,} parameters, T = {record.num_train_timesteps}, "
        f"predicts {facts['prediction_type']}, images {shape}"
    )
    console.table(
        f"{len(parts)} ranges of [0, {record.num_train_timesteps}), "
        f"data: {facts['data'] or 'not set'}",
        ["range", "timesteps", "draws", "SNR from (dB)", "to (dB)"],
        [
            [f"{index}/{len(parts)}", str(part.range), str(part.num_draws),
             f"{part.snr_first:.1f}", f"{part.snr_last:.1f}"]
            for index, part in enumerate(parts, start=1)
        ],
    )  # fmt: skip
