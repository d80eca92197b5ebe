"""Which network turns images into features, by its file and checksum, before it is loaded.

`inception`, `clip` and `digits` are known by name; anything else is a TorchScript file of float32
images (B, 3, H, W) in [0, 255] -> (B, d). Only a distance on Inception features is called FID.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deme_cli.artifacts import StatisticsRecord, read_record
from deme_cli.data.digits import EMBEDDED
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.assets import clip_asset, inception_asset
from deme_cli.fetch import Asset, sha256_of

DIGITS_PATH = EMBEDDED / "digit-features.pt"
NAMED = ("inception", "clip", "digits")


@dataclass(frozen=True)
class FeatureWeights:
    """A feature network by its file. `family` is one of NAMED, or `file`.

    `published` says whether the checksum is the publisher's; None where nobody publishes one.
    """

    family: str
    name: str
    resize: str
    path: Path
    sha256: str
    published: bool | None

    @property
    def metric_name(self) -> str:
        """What a Fréchet distance on these features is called."""
        return "fid" if self.family == "inception" else f"frechet_{self.name}"

    @property
    def kernel_name(self) -> str:
        """What a kernel distance on these features is called."""
        return "kid" if self.family == "inception" else f"kernel_{self.name}"

    @property
    def extractor(self) -> dict[str, str]:
        """As a statistics record names it."""
        return {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True)
class ClassifierWeights:
    """A network that tells the class of an image, by its file: `digits`, or a TorchScript."""

    name: str
    path: Path
    sha256: str

    @property
    def card(self) -> dict[str, str]:
        """As the protocol card tells it."""
        return {"model": self.name, "sha256": self.sha256}


def find_classifier(name: str) -> ClassifierWeights:
    """The classifier that `--accuracy` names. Raises MissingError for a file that is not there."""
    path = DIGITS_PATH if name == "digits" else Path(name).expanduser()
    if not path.is_file():
        raise MissingError(
            f"--accuracy {name}: no such file; expected digits or a TorchScript of images to logits"
        )
    return ClassifierWeights("digits" if name == "digits" else path.stem, path, sha256_of(path))


def choose_features(features: str | None, references: Sequence[str]) -> str:
    """The features asked for, else those that fit the references.

    `digits` for digits, those of a `statistics` artifact where it was made with named ones, else
    `inception`.
    """
    if features is not None:
        return features
    for reference in references:
        if reference == "digits":
            return "digits"
        if reference.endswith(".safetensors") and Path(reference).is_file():
            record = read_record(Path(reference))
            if isinstance(record, StatisticsRecord) and record.extractor.get("name") in NAMED:
                return record.extractor["name"]
    return "inception"


def weights_assets(features: str, resize: str, weights: Path | None) -> list[Asset]:
    """What `find_weights` will look for outside, if anything. Raises ConfigError as it does."""
    _require_settings(features, resize, weights)
    asset = _asset(features, resize) if weights is None else None
    return [] if asset is None else [asset]


def _asset(features: str, resize: str) -> Asset | None:
    """The published file of these features; None for those that come otherwise."""
    if features == "inception":
        return inception_asset(resize)
    return clip_asset() if features == "clip" else None


def find_weights(
    features: str, resize: str = "clean", weights: Path | None = None
) -> FeatureWeights:
    """The feature network that `--features`, `--resize` and `--weights` name.

    resize counts for Inception alone: images reach the other networks in their own way. Raises
    ConfigError for settings that contradict each other, MissingError for a file that is not there.
    """
    _require_settings(features, resize, weights)
    asset = _asset(features, resize)
    if asset is None:
        path = DIGITS_PATH if features == "digits" else Path(features).expanduser()
    elif (found := weights if weights is not None else asset.find()) is None:
        raise MissingError(f"{asset.name}: the {asset.what} are missing; fetch {asset.url}")
    else:
        path = found
    if not path.is_file():
        raise MissingError(f"{path}: no such file of feature network weights")
    digest = sha256_of(path)
    known = None if asset is None else asset.sha256
    if features == "clip" and path.suffix == ".safetensors":
        known = None  # the same weights in another file, of no published checksum
    published = None if known is None else digest == known
    if features not in NAMED:
        name = re.sub(r"\W+", "_", path.stem).strip("_").lower()
        return FeatureWeights("file", name, "none", path, digest, published)
    way = {"inception": resize, "clip": "clip", "digits": "none"}[features]
    return FeatureWeights(features, features, way, path, digest, published)


def _require_settings(features: str, resize: str, weights: Path | None) -> None:
    if features not in NAMED and not Path(features).expanduser().is_file():
        raise MissingError(
            f"--features {features}: no such file; expected {', '.join(NAMED)} or a TorchScript"
        )
    if weights is not None and features not in ("inception", "clip"):
        raise ConfigError(
            "--weights goes with --features inception or clip; others bring their own"
        )
    if resize != "clean" and features != "inception":
        raise ConfigError(f"--resize {resize} goes with --features inception, not {features}")


def require_same_extractor(record: StatisticsRecord, weights: FeatureWeights, where: str) -> None:
    """Check that statistics were made with this network and resize mode; raises ArtifactError."""
    made = (record.extractor.get("name"), record.extractor.get("sha256"), record.resize)
    if made != (weights.name, weights.sha256, weights.resize):
        raise ArtifactError(
            f"{where}: made with {_shown(*made)}, this run uses "
            f"{_shown(weights.name, weights.sha256, weights.resize)}; "
            f"set --features, --resize and --weights as then, or run `deme stats` again"
        )


def _shown(name: str | None, digest: str | None, resize: str) -> str:
    return f"{name} (sha256 {str(digest)[:12]}, resize {resize})"
