"""Options that several commands share, as `Annotated` aliases, and what all of them do first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
from deme_cli.config import COMPILE, DTYPES, ModelConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile, read_run_file
from deme_cli.settings import help_of

COMMON = "Common"
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def option(config: type, name: str, *flags: str, panel: str | None = None) -> Any:
    """A Typer option for one setting of `config`; its help is the setting's own sentence."""
    text = help_of(config, name).replace("[", r"\[")  # else rich takes [default: 4] for markup
    return typer.Option(*flags, help=text, rich_help_panel=panel, show_default=False)


def _known_device(name: str) -> str:
    """--device, checked before any command loads torch."""
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda, cuda:i or mps")
    return name


def _known_dtype(name: str) -> str:
    """--dtype, checked before any command loads torch."""
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return name


def _known_compile(how: str) -> str:
    """--compile, checked before any command loads torch."""
    if how not in COMPILE:
        raise ConfigError(f"--compile {how}: expected one of {', '.join(COMPILE)}")
    return how


ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", help=r"The deme.toml to read \[default: ./deme.toml].",
                 rich_help_panel=COMMON, show_default=False),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:i or mps.", callback=_known_device,
                 rich_help_panel=COMMON),
]  # fmt: skip
Dtype = Annotated[
    str,
    typer.Option("--dtype", help=f"Precision: {', '.join(DTYPES)}.", callback=_known_dtype,
                 rich_help_panel=COMMON),
]  # fmt: skip
Compile = Annotated[
    str,
    typer.Option("--compile", callback=_known_compile, rich_help_panel=COMMON,
                 help="torch.compile: on, off, or auto (on GPUs, for long work)."),
]  # fmt: skip
Pipeline = Annotated[str | None, option(ModelConfig, "pipeline", "--pipeline", panel=COMMON)]
Force = Annotated[
    bool, typer.Option("--force", help="Replace an existing output.", rich_help_panel=COMMON)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=COMMON)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only results and errors.", rich_help_panel=COMMON)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what would run, and stop.",
                 rich_help_panel=COMMON),
]  # fmt: skip


def begin(config: Path | None, *, quiet: bool) -> RunFile:
    """What every command does first: mind --quiet, read deme.toml."""
    console.set_quiet(quiet)
    return read_run_file(config)
