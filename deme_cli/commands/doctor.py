"""`deme doctor`: what is on this machine, and what a run would need from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.commands.options import Json, Quiet, begin

if TYPE_CHECKING:
    from deme_cli.evaluation.inventory import Inventory, Item


def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the libraries, the device, and the files that runs need: there or missing, whence.

    In a run's folder also the parts of the pipeline (VAE, text encoders) that
    its base needs.

    Example: deme doctor
    """
    import deme_cli

    inventory = deme_cli.take_inventory(begin(None, quiet=quiet))
    _show(inventory)
    if as_json:
        console.result_json({
            "versions": inventory.versions, "device": inventory.device,
            "cache": str(inventory.cache), "items": list(map(_document, inventory.items)),
        })  # fmt: skip


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


def _show(inventory: Inventory) -> None:
    versions = (f"{name} {version or 'MISSING'}" for name, version in inventory.versions.items())
    console.note("  ".join(versions))
    console.note("device " + "  ".join(f"{key} {value}" for key, value in inventory.device.items()))
    for item in inventory.items:
        if item.path is None:
            checksum = f"  sha256 {item.sha256}" if item.sha256 else ""
            console.note(f"missing  {item.name}  for {item.needed_for}\n"
                         f"         from {item.whence}{checksum}")  # fmt: skip
        else:
            remark = "  (another checksum than published)" if item.intact is False else ""
            console.note(f"present  {item.name}  for {item.needed_for}\n"
                         f"         {item.path}{remark}")  # fmt: skip
    console.note(
        f"the digits need none of the missing files; a command fetches those that it needs, where "
        f"their hosts can be reached, else put them into {inventory.cache} (DEME_CACHE chooses "
        f"another)"
    )
