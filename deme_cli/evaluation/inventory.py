"""What is on this machine: libraries, the device, and the files that runs need: where, whence.

Torch is loaded for the device and for the parts of a pipeline alone.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from deme_cli import __version__
from deme_cli.artifacts import read_record
from deme_cli.config import RESIZES, EvalConfig
from deme_cli.data.digits import BASE_PATH
from deme_cli.data.prompts import KNOWN_PROMPTS, prompt_assets
from deme_cli.diffusion.model_files import require_parts
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.evaluation.protocols import library_version
from deme_cli.evaluation.references import (
    CLIP_REPOSITORY,
    DIGITS_PATH,
    PUBLISHED_STATISTICS,
    clip_asset,
    published_weights,
    statistics_asset,
)
from deme_cli.fetch import cache_folder, is_hub_id, is_model_cached, sha256_of
from deme_cli.run_file import RunFile

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "clean-fid",
    "open-clip-torch", "datasets", "scikit-learn", "scipy", "numpy",
)  # fmt: skip


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


@dataclass(frozen=True)
class Inventory:
    """versions: of deme, Python and libraries, None for one that is missing.   items: files that
    runs need, there or not.   cache: the folder where those are looked for that are fetched."""

    versions: Mapping[str, str | None]
    device: Mapping[str, Any]
    items: Sequence[Item]
    cache: Path


def take_inventory(run: RunFile | None = None) -> Inventory:
    """Look at what runs need; with the base of `run` also at the frozen parts of its pipeline."""
    run = run or RunFile()
    items = list(known_files())
    if run.base.is_file():
        items += companions_of(run.base, run.pipeline())
    own = {"deme": __version__, "python": platform.python_version()}
    versions = {**own, **{name: library_version(name) for name in LIBRARIES}}
    return Inventory(versions, device_facts(), items, cache_folder())


def device_facts() -> dict[str, Any]:
    """What `--device auto` takes, name and memory where it is a GPU, and how bf16 runs there."""
    import torch

    from deme_cli.diffusion.denoiser import choose_device

    device = choose_device("auto")
    if device.type != "cuda":
        facts = {"auto": device.type, "threads": torch.get_num_threads()}
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        if known and device.type == "cpu":
            has = any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
            facts["bf16"] = "in hardware" if has else "emulated, slow"
        return facts
    properties = torch.cuda.get_device_properties(device)
    return {
        "auto": device.type, "gpus": torch.cuda.device_count(), "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "bf16": "in hardware" if torch.cuda.is_bf16_supported(False) else "emulated, slow",
    }  # fmt: skip


def known_files() -> Iterator[Item]:
    """Every file that commands know by name, embedded ones first."""
    package = importlib.util.find_spec("sklearn")  # not imported: that takes a second
    sklearn = Path(package.origin if package and package.origin else "sklearn").parent
    digits = sklearn / "datasets" / "data" / "digits.csv.gz"
    install = "deme itself: install it again"
    for path, needed_for, whence in (
        (BASE_PATH, "the embedded model digits", install),
        (DIGITS_PATH, "--features digits", install),
        (digits, "the embedded data digits", "pip install scikit-learn"),
    ):
        yield Item(path.name, needed_for, path if path.is_file() else None, whence)
    clip = f"{EvalConfig().clip_model}/{EvalConfig().clip_weights}"
    for asset, needed_for in (
        (published_weights("inception", "clean"), "--fid, --kid (resize clean, legacy_tensorflow)"),
        (published_weights("inception", "legacy_pytorch"), "--fid, --kid (resize legacy_pytorch)"),
        *((statistics_asset(dataset, resize), f"--fid {dataset} (resize {resize})")
          for dataset, resize in product(PUBLISHED_STATISTICS, RESIZES)),
        *((published_weights(name, "clean"), f"--features {name}") for name in ("clip", "dinov2")),
        *((asset, f"--prompts {name}") for name in KNOWN_PROMPTS for asset in prompt_assets(name)),
        (clip_asset(clip, CLIP_REPOSITORY), "--clip-score"),
    ):  # fmt: skip
        assert asset is not None, "of a name that is published"
        copy, intact = asset.find(), None
        if copy is not None and copy.suffix == Path(asset.name).suffix and asset.sha256:
            intact = sha256_of(copy) == asset.sha256
        yield Item(asset.name, needed_for, copy, asset.url, asset.sha256, intact)


def companions_of(base: Path, pipeline: str | None) -> Iterator[Item]:
    """The frozen parts (VAE, text encoders) that an imported base needs around it.

    pipeline: where they are looked for, else where the base came from. Of a hub id only what is
    cached counts: nothing is fetched.
    """
    from deme_cli.diffusion.backbones import backbone_of

    record = read_record(base, "base")
    source = pipeline or record.source
    folder = Path(source).expanduser()
    if not folder.is_dir() and is_hub_id(source) and is_model_cached(source):
        from huggingface_hub import snapshot_download

        with suppress(OSError):  # the cache holds a part of it
            folder = Path(snapshot_download(source, local_files_only=True))
    for part in backbone_of(record.model_config).parts:
        path = None
        with suppress(MissingError, ArtifactError):  # not there, or of several variants
            require_parts(folder, [part])
            path = folder / part
        yield Item(part, f"{base}: sampling and finetuning", path, source)
