"""What images are compared with: a named dataset, images, or statistics somebody made before.

`find_reference` tells at once, without torch, whether a reference can be had and fits the features
in use; `targets` opens it. The reference of CIFAR-10 is the train split (50,000 images), that of
the digits the test split.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.artifacts import StatisticsRecord, record_of
from deme_cli.data.image_source import FOLDERS_ONLY, find_image_source
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.assets import PUBLISHED_STATISTICS, statistics_asset
from deme_cli.evaluation.weights import FeatureWeights, require_same_extractor
from deme_cli.fetch import Asset
from deme_cli.files import read_header

SPLITS = {"train": "train", "test": "held-out", "held-out": "held-out", "all": "all"}
_DEFAULT_SPLITS = {"digits": "held-out", "cifar10": "train"}


@dataclass(frozen=True)
class Reference:
    """A reference that is there. kind: `published`, `npz`, `statistics` or `images`.

    `split` is of images; `n` how many images stand behind statistics, where that is known.
    `sha256` is of the file, or the fingerprint of the images, once they are opened.
    """

    source: str
    kind: str
    path: Path | None = None
    n: int | None = None
    split: str | None = None
    sha256: str | None = None

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
