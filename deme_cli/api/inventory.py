"""What is on this machine: versions of libraries, the device, and the files that runs need."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.evaluation.inventory import Item as Item

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "clean-fid",
    "open-clip-torch", "datasets", "scikit-learn", "scipy", "numpy",
)  # fmt: skip


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
    from deme_cli import __version__
    from deme_cli.evaluation import inventory
    from deme_cli.fetch import cache_folder

    run = run or RunFile()
    items = list(inventory.take_inventory())
    if run.base.is_file():
        items += inventory.take_companions(run.base, run.pipeline())
    versions = {
        "deme": __version__,
        "python": platform.python_version(),
        **{name: library_version(name) for name in LIBRARIES},
    }
    return Inventory(versions, device_facts(), items, cache_folder())


def library_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_facts() -> dict[str, Any]:
    """What `--device auto` takes, and its name and memory where it is a GPU."""
    import torch

    from deme_cli.diffusion.denoiser import choose_device

    device = choose_device("auto")
    if device.type != "cuda":
        return {"auto": device.type, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "auto": device.type,
        "gpus": torch.cuda.device_count(),
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
