"""What images are compared with: a named dataset, images, or statistics somebody made before.

`find_reference` tells at once, without torch, whether a reference can be had and fits the features
in use; `open_reference` reads it, or looks at its images; `reference_statistics` makes statistics
to be kept. The reference of CIFAR-10 is the train split (50,000 images), that of the digits the
test split.
n images, d features.
"""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.artifacts import StatisticsRecord, record_of, write_artifact
from deme_cli.config import EvalConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.data.image_source import FOLDERS_ONLY, find_image_source
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.weights import (
    FeatureWeights,
    choose_features,
    find_weights,
    require_same_extractor,
    weights_assets,
)
from deme_cli.fetch import Asset, fetch, sha256_of
from deme_cli.files import read_header, require_output
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    import numpy as np

    from deme_cli.data.images import ImageData
    from deme_cli.evaluation.features import Extractor
    from deme_cli.evaluation.frechet import RunningStatistics, Statistics

SPLITS = {"train": "train", "test": "held-out", "held-out": "held-out", "all": "all"}
_DEFAULT_SPLITS = {"digits": "held-out", "cifar10": "train"}
# Known datasets whose Inception statistics clean-fid publishes: its name, split, size, image count.
PUBLISHED_STATISTICS = {
    "cifar10": ("cifar10", "train", 32, 50_000),
    "lsun-church": ("lsun_church", "train", 256, 50_000),
}


@dataclass(frozen=True)
class Reference:
    """A reference that is there. kind: `published`, `npz`, `statistics` or `images`.

    `split` is of images; `n` how many images stand behind statistics, where that is known. Once
    opened, `sha256` is of the file, or the fingerprint of the images, and there are `statistics`
    for a Fréchet distance, or `features` (n, d) for a kernel distance; a process that has looked at
    images for another one has neither.
    """

    source: str
    kind: str
    path: Path | None = None
    n: int | None = None
    split: str | None = None
    sha256: str | None = None
    statistics: Statistics | None = field(default=None, compare=False, repr=False)
    features: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def card(self) -> dict[str, Any]:
        """As the protocol card tells it."""
        return {
            "source": self.source,
            "kind": self.kind,
            "file": self.path.name if self.path else None,
            "split": self.split,
            "n": self.n,
            "sha256": self.sha256,
        }


def statistics_asset(dataset: str, resize: str) -> Asset:
    """clean-fid's Inception statistics of a dataset in PUBLISHED_STATISTICS."""
    name, split, size, num = PUBLISHED_STATISTICS[dataset]
    file_name = f"{name}_{resize}_{split}_{size}.npz"
    package = importlib.util.find_spec("cleanfid")
    folders = package.submodule_search_locations if package else None
    return Asset(
        file_name,
        f"statistics of {num} images of {dataset} ({split})",
        f"https://www.cs.cmu.edu/~clean-fid/stats/{file_name}",
        copies=tuple(Path(folder) / "stats" / file_name for folder in folders or ()),
    )


def reference_assets(
    source: str, features: str, resize: str, *, kernel: bool = False
) -> list[Asset]:
    """What `find_reference` will look for outside: clean-fid's statistics of a known dataset."""
    if source in PUBLISHED_STATISTICS and features == "inception" and not kernel:
        return [statistics_asset(source, resize)]
    return []


def find_reference(
    source: str,
    features: str,
    resize: str = "clean",
    *,
    weights: FeatureWeights | None = None,
    kernel: bool = False,
    split: str | None = None,
) -> Reference:
    """The reference that an argument names, with its headers checked.

    weights: what statistics must have been made with, if that is to be checked now. kernel: for a
    kernel distance, which needs images. split: of images, `train`, `test` or `all`.
    Raises MissingError where something is missing, ArtifactError for statistics of other features.
    """
    for asset in reference_assets(source, features, resize, kernel=kernel):
        if (path := asset.find()) is None:
            raise MissingError(f"{source}: {asset.name} is missing; fetch {asset.url}")
        _require_npz(path)
        return Reference(source, "published", path, n=PUBLISHED_STATISTICS[source][3])
    if source == "parti":
        raise MissingError(
            "parti: PartiPrompts are prompts without images; measure --prompts parti by "
            "--clip-score, or give a folder of images"
        )
    if source in FOLDERS_ONLY and not Path(source).is_dir():
        raise MissingError(
            f"{source}: no statistics of {FOLDERS_ONLY[source]} are published for these features; "
            f"get the images and make them: deme stats FOLDER -o {source}.safetensors"
        )
    if found := _find_statistics(Path(source).expanduser(), source, weights):
        if kernel:
            raise ConfigError(
                f"--kid {source}: holds a mean and covariance; a kernel distance needs images"
            )
        return found
    return find_images(source, split)


def find_images(source: str, split: str | None = None) -> Reference:
    """The images that an argument names, and the split of them that is meant.

    Raises MissingError where nothing is there, ConfigError for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected one of train, test, all")
    find_image_source(source)
    default = _DEFAULT_SPLITS.get(source, "all")
    return Reference(source, "images", split=SPLITS[split] if split else default)


def _find_statistics(path: Path, source: str, weights: FeatureWeights | None) -> Reference | None:
    if path.suffix == ".npz":
        _require_npz(path)
        return Reference(source, "npz", path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    record = record_of(read_header(path))
    if not isinstance(record, StatisticsRecord):
        return None  # samples are images; anything else is refused as such
    if weights is not None:
        require_same_extractor(record, weights, source)
    return Reference(source, "statistics", path, n=record.n)


def _require_npz(path: Path) -> None:
    """Check that an .npz holds mu and sigma, from its table of contents."""
    if not path.is_file():
        raise MissingError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f"{path}: not a whole .npz file; fetch or make it again")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    if not {"mu.npy", "sigma.npy"} <= names:
        found = ", ".join(sorted(name.removesuffix(".npy") for name in names)) or "nothing"
        raise ArtifactError(f"{path}: expected the arrays mu and sigma, found {found}")


def open_reference(
    reference: Reference,
    extractor: Extractor,
    shape: tuple[int, int, int] | None = None,
    *,
    kernel: bool = False,
    world: World = ALONE,
    progress: Progress = silent,
) -> Reference:
    """The reference with its statistics, or for a kernel distance with its features.

    shape: (C, H, W) that images come at; None for their own size. Processes of `world` share the
    images. Raises ArtifactError if statistics have another number of features.
    """
    if reference.path is not None:
        statistics = _read_statistics(reference)
        d = len(statistics.mu)
        if shape is not None and d != (num_features := extractor.num_features(shape)):
            raise ArtifactError(
                f"{reference.path}: statistics of {d} features, {extractor.name} has {num_features}"
            )
        return replace(reference, sha256=sha256_of(reference.path), statistics=statistics)
    import numpy as np

    from deme_cli.data.images import open_images

    data = open_images(reference.source, shape=shape, split=reference.split or "all")
    label = f"reference {reference.source}"
    running, kept = _look_at(data, extractor, label, world, progress, keep=kernel)
    opened = replace(reference, n=len(data), sha256=data.fingerprint)
    if not world.is_first:
        return opened
    if kernel:
        return replace(opened, features=np.concatenate(kept))
    return replace(opened, statistics=running.statistics())


def _look_at(
    data: ImageData,
    extractor: Extractor,
    label: str,
    world: World,
    progress: Progress,
    *,
    keep: bool = False,
) -> tuple[RunningStatistics, list[np.ndarray]]:
    """Mean and covariance of the features of a set, and, with `keep`, themselves in float32."""
    from deme_cli.evaluation.features import image_features
    from deme_cli.evaluation.frechet import RunningStatistics

    running, kept = RunningStatistics(), []
    for features in image_features(data, extractor, world):
        running.add(features)
        if keep:
            kept.append(features.astype("float32"))
        progress(Step(running.n, len(data), label, "image"))
    return running, kept


def _read_statistics(reference: Reference) -> Statistics:
    """The mean and covariance in a file; raises ArtifactError where their shapes do not fit."""
    import numpy as np
    from safetensors.numpy import load_file

    from deme_cli.evaluation.frechet import Statistics

    path = reference.path
    assert path is not None
    if reference.kind == "statistics":
        arrays = load_file(path)
        mu, sigma = arrays.get("mu"), arrays.get("sigma")
    else:
        try:
            with np.load(path, allow_pickle=False) as archive:
                mu, sigma = archive["mu"], archive["sigma"]
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise ArtifactError(
                f"{path}: cannot be read: {error}; fetch or make it again"
            ) from error
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = [None if part is None else tuple(part.shape) for part in (mu, sigma)]
        raise ArtifactError(
            f"{path}: expected mu (d,) and sigma (d, d), found {shapes[0]}, {shapes[1]}"
        )
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), reference.n or 0)


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
    progress: Progress = silent,
) -> StatisticsRecord | None:
    """Make the reference statistics that `evaluate` takes distances to.

    data: a folder, parquet file, hub dataset id, samples, digits or cifar10.   settings: of which
    features, resize and batch_size count; those of `run` if None.   split: train, test or all; None
    for the usual one.   size: bring images to that many pixels a side first, cropped, or with
    `squeeze` squeezed.   weights: the file of the Inception or CLIP features.   progress: is
    told how far it is.

    Returns the record, None in the other processes of a launch. Raises ConfigError, MissingError,
    ArtifactError, NumericsError; then no output appears.
    """
    settings = settings or (run or RunFile()).settings(EvalConfig)
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
    features = choose_features(settings.features, [data])
    split = find_images(data, split).split or "all"
    with world.first_before_others():
        fetch(weights_assets(features, settings.resize, weights), progress)
    found = find_weights(features, settings.resize, weights)

    import numpy as np

    from deme_cli.data.images import open_images
    from deme_cli.evaluation.features import open_extractor

    extractor = open_extractor(found, device=world.device or device, batch_size=settings.batch_size)
    shape = None if size is None else (3, size, size)
    images = open_images(data, shape=shape, split=split, squeeze=squeeze)
    running, _ = _look_at(images, extractor, f"looking at {data}", world, progress)
    made = None
    if world.is_first:
        statistics = running.statistics()
        described = {
            "fingerprint": images.fingerprint, "split": split, "shape": list(images.shape),
            "squeezed": images.squeeze,
        }  # fmt: skip
        record = StatisticsRecord(
            n=statistics.n, extractor=found.extractor, resize=found.resize, source=images.source,
            data=described,
        )  # fmt: skip
        n = np.array(statistics.n, dtype=np.int64)
        tensors = {"mu": statistics.mu, "sigma": statistics.sigma, "n": n}
        made = write_artifact(output, tensors, record)
    world.wait()  # nobody ends well before the statistics are there
    return made
