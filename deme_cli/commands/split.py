"""`deme split`: import the base, divide [0, T), and write what every later command reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, OptionsOf, argument, command, flag, option
from deme_cli.config import AFFINITY_NAME, CONFIG_NAME, DataConfig, ModelConfig, SplitConfig
from deme_cli.run_file import RunFile


@command("pipeline save_dtype force dry_run")
def split(
    given: Annotated[Given, OptionsOf(SplitConfig, ("n", "by"))],
    common: Given,
    model: Annotated[str | None, argument(
        "MODEL", "digits, a diffusers folder, a hub id, or a base or merged artifact "
        "[default: digits].",
    )] = None,
    data: Annotated[str | None, option(DataConfig, "source")] = None,
    gradients: Annotated[Path | None, flag(
        "--gradients", "For --by gradient: what `deme analyze gradients` wrote "
        f"[default: {AFFINITY_NAME} in the output folder].",
    )] = None,
    variant: Annotated[str | None, flag(
        "--variant", "Of a folder with several sets of weights: which, as fp16 or non_ema.",
    )] = None,
    as_base: Annotated[str | None, flag(
        "--as-base", "Of two denoisers (Wan 2.2 A14B): low, high or mean [default: low].",
    )] = None,
    output: Annotated[Path, flag(
        "--output -o", f"Folder for {CONFIG_NAME} and {ModelConfig.base}."
    )] = Path("."),
    as_json: bool = False,
) -> None:  # fmt: skip
    """Import a pretrained model and divide its timesteps into ranges, one expert each.

    Example: deme split digits -n 4
    """
    settings, dry_run = RunFile().settings(SplitConfig, **given), common["dry_run"]
    with console.showing() as progress:
        progress(console.Step(label="loading the libraries and the model"))
        done = deme_cli.split(
            model, settings, data=data, gradients=gradients, variant=variant,
            as_base=as_base, output=output, **common,
        )  # fmt: skip
    record, facts, parts = done.record, done.facts, done.parts
    for assumed in facts["notes"]:
        console.warn(assumed)
    shape = " x ".join(map(str, facts["image_shape"]))
    if record.companions:
        shape += f", latents {' x '.join(map(str, facts['sample_shape']))}"
    console.note(
        f"{record.origin}: {record.model_config['_class_name']}, "
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
    paths = [] if dry_run else [done.base, done.config, *done.experts]
    console.result_paths(paths, as_json=as_json, dry_run=dry_run, **facts)
