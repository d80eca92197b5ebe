"""`reference_statistics`: mean and covariance of the features of images, as an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.api.fetching import fetch
from deme_cli.config import EvalConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ConfigError
from deme_cli.files import require_output
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.artifacts import StatisticsRecord
    from deme_cli.data.images import ImageData
    from deme_cli.evaluation.features import Extractor


def reference_statistics(
    data: str,
    output: Path,
    settings: EvalConfig | None = None,
    *,
    split: str | None = None,
    size: int | None = None,
    squeeze: bool = False,
    weights: Path | None = None,
    run: RunFile | None = None,
    device: str = "auto",
    force: bool = False,
    world: World = ALONE,
) -> StatisticsRecord | None:
    """Make the reference statistics that `evaluate` takes distances to.

    data: a folder, parquet file, hub dataset id, samples, digits or cifar10.   settings: of which
    features, resize and batch_size count; those of `run` if None.   split: train, test or all; None
    for the usual one.   size: bring images to that many pixels a side first, cropped, or with
    `squeeze` squeezed.   weights: the file of the Inception or CLIP features.

    Returns the record, None in the other processes of a launch. Raises ConfigError, MissingError,
    ArtifactError, NumericsError; then no output appears.
    """
    from deme_cli.evaluation.references import find_images
    from deme_cli.evaluation.weights import choose_features, find_weights, weights_assets

    settings = settings or (run or RunFile()).settings(EvalConfig)
    world.require_same({
        "data": data, "output": str(output), "split": split, "size": size, "squeeze": squeeze,
        "features": settings.features, "resize": settings.resize, "weights": str(weights),
        "batch_size": settings.batch_size,
    })  # fmt: skip
    if world.is_first:
        require_output(output, force=force)
    _require_sense(output, size, squeeze=squeeze)
    chosen = choose_features(settings.features, [data])
    reference = find_images(data, split)
    with world.first_before_others():
        fetch(weights_assets(chosen, settings.resize, weights))
    found = find_weights(chosen, settings.resize, weights)

    from deme_cli.evaluation.features import open_extractor
    from deme_cli.evaluation.targets import open_reference_images

    extractor = open_extractor(found, device=world.device or device, batch_size=settings.batch_size)
    shape = None if size is None else (3, size, size)
    images = open_reference_images(reference, shape, squeeze=squeeze)
    made = _measure(images, extractor, reference.split or "all", output, world)
    world.wait()  # nobody ends well before the statistics are there
    return made


def _measure(
    images: ImageData, extractor: Extractor, split: str, output: Path, world: World
) -> StatisticsRecord | None:
    """Look at all images, with a bar, and write what was found."""
    from deme_cli.artifacts import write_artifact
    from deme_cli.evaluation.frechet import Statistics
    from deme_cli.evaluation.statistics import measure_statistics, statistics_artifact

    made = None
    with console.progress(f"looking at {images.source}", len(images), "image") as bar:
        for record in measure_statistics(images, extractor, world):
            if isinstance(record, Statistics):
                tensors, described = statistics_artifact(record, images, extractor, split=split)
                made = write_artifact(output, tensors, described)
            else:
                bar.advance(record.done)
    return made


def _require_sense(output: Path, size: int | None, *, squeeze: bool) -> None:
    if size is not None and size < 1:
        raise ConfigError(f"--size {size}: expected a number of pixels above 0")
    if squeeze and size is None:
        raise ConfigError("--squeeze needs --size, the side to squeeze images to")
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")
