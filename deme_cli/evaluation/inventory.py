"""What a run may need from outside or inside the package: there or missing, where, whence.

Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deme_cli.config import RESIZES
from deme_cli.data.digits import BASE_PATH
from deme_cli.evaluation.assets import (
    PUBLISHED_STATISTICS,
    Asset,
    clip_asset,
    inception_asset,
    sha256_of,
    statistics_asset,
)
from deme_cli.evaluation.weights import DIGITS_PATH


@dataclass(frozen=True)
class Item:
    """A file that something needs. `path` is None where it is missing.

    `intact` compares the checksum with the published one; None where there is nothing to compare.
    """

    name: str
    needed_for: str
    path: Path | None
    whence: str
    sha256: str | None = None
    intact: bool | None = None


def take_inventory() -> Iterator[Item]:
    """Every file, embedded ones first."""
    install = "deme itself: install it again"
    yield _embedded(BASE_PATH, "the embedded model digits", install)
    yield _embedded(DIGITS_PATH, "--features digits", install)
    package = importlib.util.find_spec("sklearn")
    digits = (
        Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package else None
    )
    yield _embedded(digits, "the embedded data digits", "pip install scikit-learn")
    yield _outside(inception_asset("clean"), "--fid, --kid (resize clean, legacy_tensorflow)")
    yield _outside(inception_asset("legacy_pytorch"), "--fid, --kid (resize legacy_pytorch)")
    for dataset in PUBLISHED_STATISTICS:
        for resize in RESIZES:
            yield _outside(statistics_asset(dataset, resize), f"--fid {dataset} (resize {resize})")
    yield _outside(clip_asset(), "--features clip")


def _embedded(path: Path | None, needed_for: str, whence: str) -> Item:
    there = path is not None and path.is_file()
    return Item(path.name if path else "digits.csv.gz", needed_for, path if there else None, whence)


def _outside(asset: Asset, needed_for: str) -> Item:
    path = asset.find()
    intact = None
    if path is not None and path.suffix == Path(asset.name).suffix and asset.sha256:
        intact = sha256_of(path) == asset.sha256
    return Item(asset.name, needed_for, path, asset.url, asset.sha256, intact)
