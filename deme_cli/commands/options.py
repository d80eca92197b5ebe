"""Options that several commands share, as `Annotated` aliases, and what all of them do first.

Most options are settings: the table of settings says what they are called, what they mean and where
`--help` lists them, and a command takes them all in one parameter.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from deme_cli import console
from deme_cli.config import COMPILE, DTYPES, ModelConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile, read_run_file
from deme_cli.settings import Settings, flags_of, help_of

COMMON = "Common"
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
Given = dict[str, Any]  # values of settings, by name; None where an option was not given


@dataclass(frozen=True)
class OptionsOf:
    """Says of a command's parameter that it holds options of a table of settings: those that are
    `named`, or all, but for those `without`; `--help` lists all of them, or those `listed`."""

    config: type[Settings]
    named: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()

    @property
    def settings(self) -> Iterator[Field[Any]]:
        for item in fields(self.config):
            is_named = item.name in (self.named or (item.name,)) and item.name not in self.without
            if is_named and item.metadata["option"]:
                yield item

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One for each setting, called as its flag is, None where it is absent."""
        kinds = get_type_hints(self.config)
        for item in self.settings:
            kind: Any = str if item.metadata["parse"] else kinds[item.name]
            listed = not self.listed or item.name in self.listed
            yield inspect.Parameter(
                _parameter_name(item), inspect.Parameter.KEYWORD_ONLY, default=None,
                annotation=Annotated[kind | None, option(self.config, item.name, listed=listed)],
            )  # fmt: skip

    def collect(self, values: dict[str, Any]) -> Given:
        """Take the values of these settings out of those of all parameters."""
        given: Given = {}
        for item in self.settings:
            value, parse = values.pop(_parameter_name(item)), item.metadata["parse"]
            given[item.name] = (
                value if value is None or not parse else parse(value, flags_of(item)[0])
            )
        return given


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command say `given: Annotated[Given, OptionsOf(FinetuneConfig)]` for all its options.

    Typer sees an option for each setting in place of such a parameter. Raises ConfigError for a
    text that cannot be read.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, OptionsOf] = {}
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if group := [extra for extra in get_args(hints[name]) if isinstance(extra, OptionsOf)]:
            (groups[name],) = group
            shown += groups[name].parameters()
        else:
            shown.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {name: group.collect(values) for name, group in groups.items()}
        command(**values, **given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]  # what Typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _parameter_name(item: Field[Any]) -> str:
    """`--resize-to` and `--flip/--no-flip` as resize_to and flip."""
    return flags_of(item)[0].partition("/")[0].removeprefix("--").replace("-", "_")


def option(config: type[Settings], name: str, *, listed: bool = True) -> Any:
    """A Typer option for one setting; its help is the setting's own sentence, if it is `listed`."""
    (item,) = (item for item in fields(config) if item.name == name)
    text = help_of(item).replace("[", r"\[")  # else rich takes [default: 4] for markup
    return typer.Option(
        *flags_of(item), help=f"{text[0].upper()}{text[1:]}.",
        rich_help_panel=item.metadata["panel"], show_default=False, hidden=not listed,
    )  # fmt: skip


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
Pipeline = Annotated[str | None, option(ModelConfig, "pipeline")]
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
