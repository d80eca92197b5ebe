"""`deme stats`: reference statistics of a set of images, for `deme eval --fid`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, OptionsOf, argument, command, flag
from deme_cli.config import EvalConfig
from deme_cli.files import read_header


@command("config device force", meets=True)
def stats(
    data: Annotated[str, argument(
        "DATA", "Images: a folder, zip, LMDB, .npz, parquet file, hub dataset id, samples, digits "
        "or cifar10.",
    )],
    given: Annotated[Given, OptionsOf(EvalConfig, ("features", "resize", "batch_size"))],
    common: Given,
    output: Annotated[Path, flag("--output -o", "The statistics artifact.")],
    split: Annotated[str | None, flag(
        "--split",
        "train, test or all [default: test for digits, train for cifar10, else all].",
    )] = None,
    size: Annotated[int | None, flag(
        "--size", "Bring images to SIZE x SIZE pixels first, scaled and cropped [default: their "
        "own size].",
    )] = None,
    squeeze: Annotated[bool, flag(
        "--squeeze", "Squeeze images to SIZE x SIZE without cropping (BK-SDM's COCO).",
    )] = False,
    weights: Annotated[Path | None, flag(
        "--weights", "File of the Inception or CLIP weights.",
    )] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Make reference statistics of images: mean and covariance of their features.

    Processes of one launch (torchrun, accelerate launch, srun) share the images.

    Example: deme stats digits -o digits-train.safetensors --split train
    """
    settings = common.pop("run").settings(EvalConfig, **given)
    with console.showing() as progress:
        made = deme_cli.reference_statistics(
            data, output, settings, split=split, size=size, squeeze=squeeze, weights=weights,
            progress=progress, **common,
        )  # fmt: skip
    if made is not None:
        num_features = read_header(output).tensors["mu"].num_elements
        console.result_paths(
            [output], as_json=as_json, n=made.n, num_features=num_features,
            extractor=made.extractor, resize=made.resize, source=made.source, data=made.data,
        )  # fmt: skip
