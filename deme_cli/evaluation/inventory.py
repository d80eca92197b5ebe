"""What a run may need from outside or inside the package: there or missing, where, whence.

Torch is loaded for the CLIP score's weights and for the parts of a pipeline alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deme_cli.artifacts import read_record
from deme_cli.config import RESIZES, EvalConfig
from deme_cli.data.digits import BASE_PATH
from deme_cli.data.prompts import KNOWN_PROMPTS, prompt_assets
from deme_cli.diffusion.model_files import require_parts
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.evaluation.assets import (
    PUBLISHED_STATISTICS,
    clip_asset,
    inception_asset,
    statistics_asset,
)
from deme_cli.evaluation.weights import DIGITS_PATH
from deme_cli.fetch import Asset, is_hub_id, is_model_cached, sha256_of


@dataclass(frozen=True)
class Item:
    """A file or folder that something needs. `path` is None where it is missing.

    `intact` compares the checksum with the published one; None where there is nothing to compare.
    """

    name: str
    needed_for: str
    path: Path | None
    whence: str
    sha256: str | None = None
    intact: bool | None = None


def take_inventory() -> Iterator[Item]:
    """Every file that commands know by name, embedded ones first."""
    install = "deme itself: install it again"
    yield _embedded(BASE_PATH, "the embedded model digits", install)
    yield _embedded(DIGITS_PATH, "--features digits", install)
    package = importlib.util.find_spec("sklearn")
    digits = None
    if package and package.origin:
        digits = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    yield _embedded(digits, "the embedded data digits", "pip install scikit-learn")
    yield _outside(inception_asset("clean"), "--fid, --kid (resize clean, legacy_tensorflow)")
    yield _outside(inception_asset("legacy_pytorch"), "--fid, --kid (resize legacy_pytorch)")
    for dataset in PUBLISHED_STATISTICS:
        for resize in RESIZES:
            yield _outside(statistics_asset(dataset, resize), f"--fid {dataset} (resize {resize})")
    yield _outside(clip_asset(), "--features clip")
    for name in KNOWN_PROMPTS:
        for asset in prompt_assets(name):
            yield _outside(asset, f"--prompts {name}")
    yield _clip_score(EvalConfig())


def take_companions(base: Path, pipeline: str | None) -> Iterator[Item]:
    """The frozen parts (VAE, text encoders) that an imported base needs around it.

    pipeline: where they are looked for, else where the base came from. Of a hub id only what is
    cached counts: nothing is fetched.
    """
    from deme_cli.diffusion.backbones.known import backbone_of

    record = read_record(base, "base")
    source = pipeline or record.source
    folder = _pipeline_folder(source)
    for part in backbone_of(record.model_config).parts:
        path = folder / part if folder and _has_part(folder, part) else None
        yield Item(part, f"{base}: sampling and finetuning", path, source)


def _pipeline_folder(source: str) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not (is_hub_id(source) and is_model_cached(source)):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except OSError:  # the cache holds a part of it
        return None


def _has_part(folder: Path, part: str) -> bool:
    try:
        require_parts(folder, [part])
    except (MissingError, ArtifactError):  # not there, or of several variants
        return False
    return True


def _clip_score(config: EvalConfig) -> Item:
    """The default weights of the CLIP score; what they are called is open_clip's to say."""
    from deme_cli.evaluation.clip_weights import published_clip

    tag = published_clip(config.clip_model, config.clip_weights)
    name = f"{tag.architecture}/{tag.tag}"
    whence = f"https://huggingface.co/{tag.repository} (its files into {tag.folder})"
    return Item(name, "--clip-score", tag.find(), whence)


def _embedded(path: Path | None, needed_for: str, whence: str) -> Item:
    there = path is not None and path.is_file()
    return Item(path.name if path else "digits.csv.gz", needed_for, path if there else None, whence)


def _outside(asset: Asset, needed_for: str) -> Item:
    path = asset.find()
    intact = None
    if path is not None and path.suffix == Path(asset.name).suffix and asset.sha256:
        intact = sha256_of(path) == asset.sha256
    return Item(asset.name, needed_for, path, asset.url, asset.sha256, intact)
