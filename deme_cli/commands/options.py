"""How a function becomes a command: its options, those that commands share, and what comes first.

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
from deme_cli.distributed import meet
from deme_cli.errors import ConfigError
from deme_cli.run_file import read_run_file

Given = dict[str, Any]  # values of options by name; of a setting None where it was not given
Function = Callable[..., None]


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
                one = Annotated[kind | None, option(self.config, item.name, listed=is_listed)]
                flag = flags_of(item)[0].partition("/")[0].removeprefix("--").replace("-", "_")
                found[item] = _parameter(flag, one, None)
        return found


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def flags_of(item: Field[Any]) -> list[str]:
    """The flags of the option of a setting, the long one first, as `--flip/--no-flip`."""
    long, short = f"--{item.name.replace('_', '-')}", item.metadata["flags"].split()
    own = [flag for flag in short if flag.startswith("--")]
    return [*(own or [long]), *(flag for flag in short if flag not in own)]


def option(config: type[Settings], name: str, *, listed: bool = True) -> Any:
    """A Typer option for one setting; its help is the setting's own sentence, its choices and its
    default, if it is `listed`."""
    (item,) = (item for item in fields(config) if item.name == name)
    text: str = item.metadata["help"]
    if item.metadata["choices"]:
        text += f" ({', '.join(item.metadata['choices'])})"
    if item.default not in (None, MISSING, "") and not isinstance(item.default, bool):
        text += f" [default: {item.default}]"
    panels = (title for title, names in config.PANELS.items() if name in names.split())
    return flag(
        " ".join(flags_of(item)), f"{text[0].upper()}{text[1:]}.", next(panels, None),
        show_default=False, hidden=not listed,
    )  # fmt: skip


def flag(flags: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """A Typer option of these flags, separated by spaces; more: as Typer calls it."""
    help = help.replace("[", r"\[")  # else rich takes [default: 4] for markup
    return typer.Option(*flags.split(), help=help, rich_help_panel=panel, **more)


def argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help.replace("[", r"\["))


def _one_of(flags: str, help: str, pattern: str) -> Any:
    """An option that is checked before torch loads, by a pattern."""

    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            expected = help.rpartition(": ")[2].rstrip(".")
            raise ConfigError(f"{flags} {value}: expected {expected}")
        return value

    return flag(flags, help, "Common", callback=check)


# What commands have in common: an option's type, and its value where it is not given.
_BASE = "Their base [default: that of deme.toml, or beside them]."
_CONFIG = "The deme.toml to read [default: ./deme.toml]."
_DEVICE = _one_of("--device", "auto, cpu, cuda, cuda:i or mps.", r"auto|cpu|mps|cuda(:\d+)?")
_DTYPE = _one_of(
    "--dtype",
    f"Precision: {', '.join(DTYPES)}. bf16 is faster from 1 M weights on, if in hardware (doctor).",
    "|".join(DTYPES),
)
_SAVED = f"Of the weights in the file, else as they come: {', '.join(DTYPES)}."
_COMPILE = "torch.compile: on, off, or auto (on GPUs, for long work)."
_JSON = "Print one JSON document on stdout."
_DRY_RUN = "Check everything, say what would run, and stop."
COMMON: dict[str, tuple[Any, Any]] = {
    "base": (Annotated[Path | None, flag("--base", _BASE, "Common")], None),
    "pipeline": (Annotated[str | None, option(ModelConfig, "pipeline")], None),
    "config": (Annotated[Path | None, flag("--config", _CONFIG, "Common")], None),
    "device": (Annotated[str, _DEVICE], "auto"),
    "dtype": (Annotated[str, _DTYPE], "fp32"),
    "save_dtype": (
        Annotated[str | None, _one_of("--save-dtype", _SAVED, "|".join(DTYPES))], None
    ),
    "compile": (Annotated[str, _one_of("--compile", _COMPILE, "|".join(COMPILE))], "auto"),
    "force": (Annotated[bool, flag("--force", "Replace an existing output.", "Common")], False),
    "dry_run": (Annotated[bool, flag("--dry-run", _DRY_RUN, "Common")], False),
    "as_json": (Annotated[bool, flag("--json", _JSON, "Common")], False),
    "quiet": (Annotated[bool, flag("--quiet -q", "Only results and errors.", "Common")], False),
}  # fmt: skip


def command(common: str = "", *, meets: bool = False) -> Callable[[Function], Function]:
    """Make a function a command that Typer reads.

    It gets, besides what it declares: for `given: Annotated[Given, OptionsOf(FinetuneConfig)]` all
    these options in one; in `common` the options that are named here, by their names in COMMON, as
    verbs take them, with the deme.toml as `run` in place of `config`; and `as_json`. meets: the
    other processes of a launch come first. Raises ConfigError for a text that cannot be read.
    """

    def wrap(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, dict[Field[Any], inspect.Parameter]] = {}
        taken: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if group := [extra for extra in get_args(hints[name]) if isinstance(extra, OptionsOf)]:
                groups[name] = group[0].parameters()
                taken += groups[name].values()
            elif name not in ("common", "as_json"):
                taken.append(_parameter(name, hints[name], parameter.default))
        taken += [_parameter(name, *COMMON[name]) for name in (*names, "as_json", "quiet")]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            console.set_quiet(values.pop("quiet"))
            if meets:
                meet(values["device"])
            if names:
                values["common"] = shared = {name: values.pop(name) for name in names}
                if "config" in shared:
                    shared["run"] = read_run_file(shared.pop("config"))
            for name, group in groups.items():
                given = {item: values.pop(parameter.name) for item, parameter in group.items()}
                values[name] = {
                    item.name: parse(value, flags_of(item)[0])
                    if value is not None and (parse := item.metadata["parse"])
                    else value
                    for item, value in given.items()
                }
            function(**values)

        run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]  # Typer reads it
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
        return run

    names = common.split()
    return wrap
