"""`deme --version`: this program, the libraries that decide what it computes, and the device."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import typer

from deme_cli import __version__


def show_version(asked: bool) -> None:
    """Print it and stop. The first line comes at once; the device needs torch, which takes time."""
    if not asked:
        return
    typer.echo(f"deme {__version__}")
    versions = ", ".join(f"{name} {library_version(name)}" for name in ("torch", "diffusers"))
    typer.echo(f"{versions}, Python {platform.python_version()}")
    device = device_facts()
    what = device.get("name") or f"threads: {device['threads']}"
    typer.echo(f"device {device['auto']} ({what})")
    raise typer.Exit


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
