"""`deme doctor`: what is on this machine, and what a run would need from elsewhere."""

from __future__ import annotations

from dataclasses import asdict

import deme_cli
from deme_cli import console
from deme_cli.commands.options import command
from deme_cli.run_file import read_run_file


@command()
def doctor(as_json: bool = False) -> None:
    """List the libraries, the device, and the files that runs need: there or missing, whence.

    In a run's folder also the parts of the pipeline (VAE, text encoders) that its base needs.

    Example: deme doctor
    """
    found = deme_cli.take_inventory(read_run_file(None))
    console.note("  ".join(f"{k} {version or 'MISSING'}" for k, version in found.versions.items()))
    console.note("device " + "  ".join(f"{key} {value}" for key, value in found.device.items()))
    for item in found.items:
        checksum = f"  sha256 {item.sha256}" if item.sha256 else ""
        remark = "  (another checksum than published)" if item.intact is False else ""
        state = "present" if item.path else "missing"
        where = f"{item.path}{remark}" if item.path else f"from {item.whence}{checksum}"
        console.note(f"{state}  {item.name}  for {item.needed_for}\n         {where}")
    console.note(
        f"the digits need none of the missing files; a command fetches those that it needs, where "
        f"their hosts can be reached, else put them into {found.cache} (DEME_CACHE chooses another)"
    )
    if as_json:
        items = [
            {**asdict(item), "present": bool(item.path), "path": item.path and str(item.path)}
            for item in found.items
        ]
        facts = {"versions": found.versions, "device": found.device, "cache": str(found.cache)}
        console.result_json({**facts, "items": items})
