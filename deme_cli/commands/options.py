"""Options that several commands share, as `Annotated` aliases, and what all of them do first.

Most options are settings: the table of settings says what they are called, what they mean and where
`--help` lists them, and a command takes them all in one parameter.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from deme_cli import console
from deme_cli.config import COMPILE, DTYPES, ModelConfig, Settings
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile, read_run_file

Given = dict[str, Any]  # values of settings, by name; None where an option was not given


@dataclass(frozen=True)
class OptionsOf:
    """Says of a command's parameter that it holds options of a table of settings: those that are
    `named`, or all, but for those `without`; `--help` lists all of them, or those `listed`."""

    config: type[Settings]
    named: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()

    def parameters(self) -> dict[Field[Any], inspect.Parameter]:
        """One for each setting, called as its flag is (`--flip/--no-flip` is flip), None where it
        is absent."""
        kinds, found = get_type_hints(self.config), {}
        for item in fields(self.config):
            is_named = item.name in (self.named or (item.name,)) and item.name not in self.without
            if is_named and item.metadata["option"]:
                kind: Any = str if item.metadata["parse"] else kinds[item.name]
                is_listed = not self.listed or item.name in self.listed
                one = option(self.config, item.name, listed=is_listed)
                flag = flags_of(item)[0].partition("/")[0].removeprefix("--").replace("-", "_")
                found[item] = inspect.Parameter(
                    flag, inspect.Parameter.KEYWORD_ONLY, default=None,
                    annotation=Annotated[kind | None, one],
                )  # fmt: skip
        return found


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command say `given: Annotated[Given, OptionsOf(FinetuneConfig)]` for all its options.

    Typer sees an option for each setting in place of such a parameter. Raises ConfigError for a
    text that cannot be read.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, dict[Field[Any], inspect.Parameter]] = {}
    taken: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if group := [extra for extra in get_args(hints[name]) if isinstance(extra, OptionsOf)]:
            groups[name] = group[0].parameters()
            taken += groups[name].values()
        else:
            taken.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            given = {item: values.pop(parameter.name) for item, parameter in group.items()}
            values[name] = {
                item.name: parse(value, flags_of(item)[0])
                if value is not None and (parse := item.metadata["parse"])
                else value
                for item, value in given.items()
            }
        command(**values)

    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]  # what Typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return run


def flags_of(item: Field[Any]) -> list[str]:
    """The flags of the option of a setting, the long one first, as `--flip/--no-flip`."""
    flags = item.metadata["flags"].split() or [f"--{item.name.replace('_', '-')}"]
    return sorted(flags, key=lambda flag: not flag.startswith("--"))


def option(config: type[Settings], name: str, *, listed: bool = True) -> Any:
    """A Typer option for one setting; its help is the setting's own sentence, its choices and its
    default, if it is `listed`."""
    (item,) = (item for item in fields(config) if item.name == name)
    text: str = item.metadata["help"]
    if item.metadata["choices"]:
        text += f" ({', '.join(item.metadata['choices'])})"
    if item.default not in (None, MISSING, "") and not isinstance(item.default, bool):
        text += f" [default: {item.default}]"
    text = text.replace("[", r"\[")  # else rich takes [default: 4] for markup
    panels = [title for title, names in config.PANELS.items() if name in names.split()]
    return typer.Option(
        *flags_of(item), help=f"{text[0].upper()}{text[1:]}.", show_default=False,
        rich_help_panel=panels[0] if panels else None, hidden=not listed,
    )  # fmt: skip


def common(*flags: str, help: str, takes: str = "", default: bool = True) -> Any:
    """An option that commands have in common; `takes` is a pattern, checked before torch loads."""

    def check(value: Any) -> Any:
        if takes and not re.fullmatch(takes, value):
            expected = help.rpartition(": ")[2].rstrip(".")
            raise ConfigError(f"{flags[0]} {value}: expected {expected}")
        return value

    return typer.Option(
        *flags, help=help, callback=check, rich_help_panel="Common", show_default=default
    )


ConfigPath = Annotated[
    Path | None,
    common("--config", help=r"The deme.toml to read \[default: ./deme.toml].", default=False),
]
_DEVICES, _PRECISION = "auto, cpu, cuda, cuda:i or mps.", f"Precision: {', '.join(DTYPES)}."
_COMPILE = "torch.compile: on, off, or auto (on GPUs, for long work)."
Device = Annotated[str, common("--device", help=_DEVICES, takes=r"auto|cpu|mps|cuda(:\d+)?")]
Dtype = Annotated[str, common("--dtype", help=_PRECISION, takes="|".join(DTYPES))]
Compile = Annotated[str, common("--compile", help=_COMPILE, takes="|".join(COMPILE))]
Pipeline = Annotated[str | None, option(ModelConfig, "pipeline")]
Base = Annotated[
    Path | None,
    common(
        "--base", help=r"Their base \[default: that of deme.toml, or beside them].", default=False
    ),
]
Force = Annotated[bool, common("--force", help="Replace an existing output.")]
Json = Annotated[bool, common("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, common("--quiet", "-q", help="Only results and errors.")]
DryRun = Annotated[
    bool, common("--dry-run", help="Check everything, say what would run, and stop.")
]


def begin(config: Path | None, *, quiet: bool) -> RunFile:
    """What every command does first: mind --quiet, read deme.toml."""
    console.set_quiet(quiet)
    return read_run_file(config)
