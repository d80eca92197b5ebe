"""`deme --version`: this program, the libraries that decide what it computes, and the device."""

from __future__ import annotations

import platform

import typer

from deme_cli import __version__


def show_version(asked: bool) -> None:
    """Print it and stop. The first line comes at once; the device needs torch, which takes time."""
    if not asked:
        return
    typer.echo(f"deme {__version__}")
    from deme_cli.evaluation.inventory import device_facts, library_version

    versions = ", ".join(f"{name} {library_version(name)}" for name in ("torch", "diffusers"))
    typer.echo(f"{versions}, Python {platform.python_version()}")
    device = device_facts()
    what = device.get("name") or f"threads: {device['threads']}"
    typer.echo(f"device {device['auto']} ({what})")
    raise typer.Exit
