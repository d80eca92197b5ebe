"""Which network turns images into features, by its file and checksum, before it is loaded.

`inception`, `clip` and `digits` are known by name; anything else is a TorchScript file of float32
images (B, 3, H, W) in [0, 255] -> (B, d). Only a distance on Inception features is called FID.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deme_cli.artifacts import StatisticsRecord, read_record
from deme_cli.data.digits import EMBEDDED
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.fetch import Asset, sha256_of, user_cache

DIGITS_PATH = EMBEDDED / "digit-features.pt"  # made by examples/digit_features.py
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
    """The published file that `find_weights` will look for, if it does.

    Raises ConfigError for settings that contradict each other, MissingError for no such features.
    """
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
    asset = _published(features, resize)
    return [asset] if asset is not None and weights is None else []


def _published(features: str, resize: str) -> Asset | None:
    if features == "inception":
        return inception_asset(resize)
    return clip_asset() if features == "clip" else None


def find_weights(
    features: str, resize: str = "clean", weights: Path | None = None
) -> FeatureWeights:
    """The feature network that `--features`, `--resize` and `--weights` name.

    resize counts for Inception alone: images reach the other networks in their own way. Raises what
    `weights_assets` raises, MissingError for a file that is not there.
    """
    path = weights
    for asset in weights_assets(features, resize, weights):
        path = asset.find()
        if path is None:
            raise MissingError(f"{asset.name}: the {asset.what} are missing; fetch {asset.url}")
    if path is None:
        path = DIGITS_PATH if features == "digits" else Path(features).expanduser()
    if not path.is_file():
        raise MissingError(f"{path}: no such file of feature network weights")
    digest, published = sha256_of(path), _published(features, resize)
    is_copy = features == "clip" and path.suffix == ".safetensors"  # open_clip's, without checksum
    known = None if published is None or is_copy else digest == published.sha256
    if features not in NAMED:
        name = re.sub(r"\W+", "_", path.stem).strip("_").lower()
        return FeatureWeights("file", name, "none", path, digest, known)
    way = {"inception": resize, "clip": "clip", "digits": "none"}[features]
    return FeatureWeights(features, features, way, path, digest, known)


def require_same_extractor(record: StatisticsRecord, weights: FeatureWeights, where: str) -> None:
    """Check that statistics were made with this network and resize mode; raises ArtifactError."""
    made = (record.extractor.get("name"), record.extractor.get("sha256"), record.resize)
    used = (weights.name, weights.sha256, weights.resize)
    if made != used:
        then, now = (
            f"{name} (sha256 {sha!s:.12}, resize {way})" for name, sha, way in (made, used)
        )
        raise ArtifactError(
            f"{where}: made with {then}, this run uses {now}; set --features, --resize and "
            f"--weights as then, or run `deme stats` again"
        )


def inception_asset(resize: str) -> Asset:
    """The Inception weights that clean-fid takes for a resize mode.

    The TorchScript of NVIDIA's StyleGAN2-ADA for `clean` and `legacy_tensorflow`, the state dict of
    pytorch-fid for `legacy_pytorch`.
    """
    if resize == "legacy_pytorch":
        name = "pt_inception-2015-12-05-6726825d.pth"
        torch_home = Path(os.environ.get("TORCH_HOME") or user_cache() / "torch").expanduser()
        return Asset(
            name,
            "Inception weights of pytorch-fid",
            f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            (torch_home / "hub" / "checkpoints" / name,),
        )
    name = "inception-2015-12-05.pt"
    own = Path("." if platform.system() == "Windows" else "/tmp")  # clean-fid's fixed place
    return Asset(
        name,
        "Inception weights",
        f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{name}",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        (own / name,),
    )


def clip_asset() -> Asset:
    """The weights of OpenAI's CLIP ViT-B/32, as in clean-fid's `clip_vit_b_32`.

    OpenAI's file, or the copy that open_clip has fetched from the hub.
    """
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    copies = hub_cache().glob(
        "models--timm--vit_base_patch32_clip_224.openai/snapshots/*/open_clip_model.safetensors"
    )
    return Asset(
        "ViT-B-32.pt",
        "CLIP ViT-B/32 weights",
        f"https://openaipublic.azureedge.net/clip/models/{digest}/ViT-B-32.pt",
        digest,
        (user_cache() / "clip" / "ViT-B-32.pt", *sorted(copies)),
    )


def hub_cache() -> Path:
    """Where the hub's library keeps what it fetches."""
    home = Path(os.environ.get("HF_HOME") or user_cache() / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
