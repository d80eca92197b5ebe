"""`deme inspect`: what artifacts say of themselves. Reads headers; --verify reads the tensors too."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
from deme_cli.artifacts import fingerprint_file, read_header, record_of
from deme_cli.commands.options import Json, Quiet
from deme_cli.errors import ArtifactError

Files = Annotated[list[Path], typer.Argument(help="Artifacts of any kind.", show_default=False)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Recompute each fingerprint; exit 4 if one differs.")
]


def inspect(files: Files, verify: Verify = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show kind, size, fingerprint, range, norms, parents and coefficients of artifacts.

    Example: deme inspect --verify base.safetensors
    """
    console.set_quiet(quiet)
    artifacts = [_describe(path) for path in files]
    if as_json:
        console.result_json({"artifacts": artifacts})
    else:
        print("\n\n".join(_as_text(artifact) for artifact in artifacts))
    if verify:
        for artifact in artifacts:
            _verify(artifact)


def _describe(path: Path) -> dict[str, Any]:
    """One artifact as the JSON document shows it."""
    header = read_header(path)
    record = record_of(header)
    return {
        "path": str(path),
        "kind": record.kind,
        "parameters": header.num_parameters,
        "tensors": len(header.tensors),
        "fingerprint": record.fingerprint,
        "record": asdict(record),
    }
