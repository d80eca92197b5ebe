"""`deme stats`: reference statistics of a set of images, for `deme eval --fid`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.launching import meet
from deme_cli.commands.options import ConfigPath, Device, Force, Json, Quiet, begin, option
from deme_cli.config import EvalConfig
from deme_cli.errors import ConfigError
from deme_cli.outputs import require_output

_C = EvalConfig


def stats(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Images: a folder, parquet file, hub dataset id, samples, digits or cifar10.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The statistics artifact.")],
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help=r"train, test or all \[default: test for digits, train for cifar10, else all].",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            help=r"Bring images to SIZE x SIZE pixels first, scaled and cropped "
            r"\[default: their own size].",
            show_default=False,
        ),
    ] = None,
    squeeze: Annotated[
        bool,
        typer.Option(
            "--squeeze", help="Squeeze images to SIZE x SIZE without cropping (BK-SDM's COCO)."
        ),
    ] = False,
    features: Annotated[str | None, option(_C, "features", "--features")] = None,
    resize: Annotated[str | None, option(_C, "resize", "--resize")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", help="File of the Inception or CLIP weights.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int | None, option(_C, "batch_size", "--batch-size", "-b")] = None,
    config: ConfigPath = None,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make reference statistics of images: mean and covariance of their features.

    Processes of one launch (torchrun, accelerate launch, srun) share the images.

    Example: deme stats digits -o digits-train.safetensors --split train
    """
    from deme_cli.artifacts import write_artifact

    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    settings = run.settings(EvalConfig, features=features, resize=resize, batch_size=batch_size)
    world.require_same({
        "data": data, "output": str(output), "split": split, "size": size, "squeeze": squeeze,
        "features": settings.features, "resize": settings.resize, "weights": str(weights),
        "batch_size": settings.batch_size,
    })  # fmt: skip
    if world.is_first:
        require_output(output, force=force)
    if size is not None and size < 1:
        raise ConfigError(f"--size {size}: expected a number of pixels above 0")
    if squeeze and size is None:
        raise ConfigError("--squeeze needs --size, the side to squeeze images to")
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")

    from deme_cli.commands.fetching import fetch
    from deme_cli.evaluation.references import find_images
    from deme_cli.evaluation.weights import choose_features, find_weights, weights_assets

    chosen = choose_features(settings.features, [data])
    reference = find_images(data, split)
    with world.first_before_others():
        fetch(weights_assets(chosen, settings.resize, weights))
    found = find_weights(chosen, settings.resize, weights)

    from deme_cli.evaluation.features import open_extractor
    from deme_cli.evaluation.statistics import (
        Statistics,
        measure_statistics,
        statistics_artifact,
    )
    from deme_cli.evaluation.targets import open_reference_images

    extractor = open_extractor(found, device=world.device or device, batch_size=settings.batch_size)
    shape = None if size is None else (3, size, size)
    images = open_reference_images(reference, shape, squeeze=squeeze)
    with console.progress(f"looking at {data}", len(images), "image") as bar:
        for record in measure_statistics(images, extractor, world):
            if not isinstance(record, Statistics):
                bar.advance(record.done)
            else:
                tensors, made = statistics_artifact(
                    record, images, extractor, split=reference.split or "all"
                )
                made = write_artifact(output, tensors, made)
    world.wait()  # nobody ends well before the statistics are there
    if world.is_first:
        console.result_paths(
            [output], as_json=as_json, n=made.n, num_features=len(tensors["mu"]),
            extractor=made.extractor, resize=made.resize, source=made.source, data=made.data,
        )  # fmt: skip
