"""`deme doctor`: what is on this machine, and what a run would need from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deme_cli import __version__, console
from deme_cli.commands.options import Json, Quiet, begin
from deme_cli.commands.version import device_facts, library_version

if TYPE_CHECKING:
    from deme_cli.evaluation.inventory import Item

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "clean-fid",
    "open-clip-torch", "datasets", "scikit-learn", "scipy", "numpy",
)  # fmt: skip


def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the libraries, the device, and the files that runs need: there or missing, whence.

    In a run's folder also the parts of the pipeline (VAE, text encoders) that
    its base needs.

    Example: deme doctor
    """
    import platform

    from deme_cli.assets import cache_folder
    from deme_cli.evaluation.inventory import take_companions, take_inventory

    run = begin(None, quiet=quiet)

    versions = {
        "deme": __version__,
        "python": platform.python_version(),
        **{name: library_version(name) for name in LIBRARIES},
    }
    items = list(take_inventory())
    if run.base.is_file():
        items += take_companions(run.base, run.pipeline())
    device = device_facts()
    _show(versions, device, items, str(cache_folder()))
    if as_json:
        console.result_json(
            {
                "versions": versions,
                "device": device,
                "cache": str(cache_folder()),
                "items": [_document(item) for item in items],
            }
        )


def _document(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "needed_for": item.needed_for,
        "present": item.path is not None,
        "path": str(item.path) if item.path else None,
        "whence": item.whence,
        "sha256": item.sha256,
        "intact": item.intact,
    }


def _show(
    versions: dict[str, str | None], device: dict[str, Any], items: list[Item], cache: str
) -> None:
    console.note("  ".join(f"{name} {version or 'MISSING'}" for name, version in versions.items()))
    console.note("device " + "  ".join(f"{key} {value}" for key, value in device.items()))
    for item in items:
        if item.path is None:
            checksum = f"  sha256 {item.sha256}" if item.sha256 else ""
            console.note(f"missing  {item.name}  for {item.needed_for}\n"
                         f"         from {item.whence}{checksum}")  # fmt: skip
        else:
            remark = "  (another checksum than published)" if item.intact is False else ""
            console.note(f"present  {item.name}  for {item.needed_for}\n"
                         f"         {item.path}{remark}")  # fmt: skip
    console.note(f"put missing files into {cache} (DEME_CACHE chooses another folder)")
