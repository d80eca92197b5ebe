"""`deme stats`: reference statistics of a set of images, for `deme eval --fid`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    Force,
    Given,
    Json,
    OptionsOf,
    Quiet,
    begin,
    takes_settings,
)
from deme_cli.config import EvalConfig
from deme_cli.distributed import meet
from deme_cli.files import read_header


@takes_settings
def stats(
    data: Annotated[str, typer.Argument(
        metavar="DATA", show_default=False,
        help="Images: a folder, parquet file, hub dataset id, samples, digits or cifar10.",
    )],
    given: Annotated[Given, OptionsOf(EvalConfig, ("features", "resize", "batch_size"))],
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics artifact.")],
    split: Annotated[str | None, typer.Option(
        "--split", show_default=False,
        help=r"train, test or all \[default: test for digits, train for cifar10, else all].",
    )] = None,
    size: Annotated[int | None, typer.Option(
        "--size", show_default=False,
        help=r"Bring images to SIZE x SIZE pixels first, scaled and cropped \[default: their own "
        r"size].",
    )] = None,
    squeeze: Annotated[bool, typer.Option(
        "--squeeze", help="Squeeze images to SIZE x SIZE without cropping (BK-SDM's COCO).",
    )] = False,
    weights: Annotated[Path | None, typer.Option(
        "--weights", help="File of the Inception or CLIP weights.", show_default=False,
    )] = None,
    config: ConfigPath = None, device: Device = "auto", force: Force = False,
    as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Make reference statistics of images: mean and covariance of their features.

    Processes of one launch (torchrun, accelerate launch, srun) share the images.

    Example: deme stats digits -o digits-train.safetensors --split train
    """
    import deme_cli

    console.set_quiet(quiet)
    meet(device)
    run = begin(config, quiet=quiet)
    settings = run.settings(EvalConfig, **given)
    with console.showing() as progress:
        made = deme_cli.reference_statistics(
            data, output, settings, split=split, size=size, squeeze=squeeze, weights=weights,
            device=device, force=force, progress=progress,
        )  # fmt: skip
    if made is not None:
        num_features = read_header(output).tensors["mu"].num_elements
        console.result_paths(
            [output], as_json=as_json, n=made.n, num_features=num_features,
            extractor=made.extractor, resize=made.resize, source=made.source, data=made.data,
        )  # fmt: skip
