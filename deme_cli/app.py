"""The Typer app: every subcommand, grouped as they are used; each is imported when it is called.

Building twelve commands with their options costs more than the rest of `deme --help`, so what it
lists is a table here, and a command is built when somebody runs it or asks for its help. Typer has
no public names for the classes of contexts and commands that its own methods take: these are `Any`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast, get_args

import typer
import typer.core
import typer.main

from deme_cli import __version__
from deme_cli.config import TABLES, Settings
from deme_cli.distributed import only_first
from deme_cli.errors import ConfigError, closest, nearest

SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "rich_markup_mode": "rich",
}
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__base__)  # Typer has no public name for it

# By panel of `deme --help`: each subcommand and its line there.
PANELS = {
    "Pipeline": {
        "split": "Import a model, divide its timesteps into ranges.",
        "finetune": "Train the expert of one range (Eq. 3-6).",
        "task-vector": "Subtract the base from experts; norms, cosines.",
        "merge": "Merge experts into one model (Eq. 8).",
        "import": "Take weights trained elsewhere as an expert.",
    },
    "Sample and measure": {
        "sample": "Draw images from one model.",
        "ensemble-sample": "Draw images, each expert in its range (Eq. 7).",
        "eval": "Measure the distance to reference images.",
        "stats": "Make reference statistics of images.",
        "compare": "Train and measure a table of methods.",
    },
    "Look and share": {
        "demo": "Run the whole pipeline on the embedded digits.",
        "analyze": "Draw the paper's figures: why it works.",
        "report": "Put a run folder on one HTML page.",
        "inspect": "Show what is in an artifact, and where it is from.",
        "export": "Write a diffusers pipeline folder.",
        "doctor": "List what runs need, and what of it is missing.",
    },
}
COMMANDS = [name for lines in PANELS.values() for name in lines]
PARTS = {"analyze": ("losses", "forecast", "gradients", "activations", "landscape", "task-vectors")}
# commands in the file, and with the settings, of another
HOME = {"ensemble-sample": "sample", "import": "import_expert"}
# What the processes of a launch do together; each of these meets the others itself.
JOINT = {"finetune", "merge", "sample", "ensemble-sample", "eval", "stats"}


_NOT_HERE = {  # options of diffusers' pipelines, and what to do instead
    "--num-frames": "deme draws one frame; `deme export` the model, and draw videos in diffusers",
    "--guidance-scale-2": "one --guidance is for all experts; `deme export` two of a WanPipeline, "
    "and give each its own in diffusers",
}


def build(name: str) -> Any:
    """Import a command, a function of its name in the file of its name or HOME; make its options.

    A group's own function is its help alone; each of its parts is a function beside it.
    """
    plain = name.replace("-", "_")
    module = import_module(f"deme_cli.commands.{HOME.get(name, plain)}")
    function = getattr(module, {"eval": "evaluate", "import": "import_expert"}.get(plain, plain))
    one = typer.Typer(**SETTINGS, cls=Group, add_completion=False, no_args_is_help=True)
    if name in PARTS:
        one.callback()(function)
        for part in PARTS[name]:
            one.command(part, cls=FirstOnly)(getattr(module, part.replace("-", "_")))
    else:
        one.command(name, cls=Command if name in JOINT else FirstOnly)(function)
    return typer.main.get_command(one)


def _convert_plainly(parameters: Sequence[Any]) -> None:
    """Have texts, readable paths and what is absent converted without pydantic, which Typer 0.29
    imports for every value, and which takes as long as numpy; the rest, and what is wrong, as ever.
    """
    for parameter in parameters:
        if hasattr(parameter, "get_runtime_param") and hasattr(parameter, "type_descriptor"):
            parameter.get_runtime_param = _plain_or(parameter)


def _plain_or(parameter: Any) -> Callable[[], Any]:
    by_typer, annotation = parameter.get_runtime_param, parameter.type_descriptor.annotation
    kind = (*get_args(annotation), annotation)[0]  # of each value of a list

    def is_plain(value: Any) -> bool:
        if type(value) is str and kind is Path:
            return os.access(value, os.R_OK) or not os.path.exists(value)
        return type(value) is kind

    def coerce(value: Any, param: Any, ctx: Any) -> Any:
        takes_many = param.multiple or param.nargs == -1
        values = [] if value is None else value if takes_many else [value]
        if not isinstance(values, (list, tuple)) or not all(map(is_plain, values)):
            return by_typer().coerce(value, param=param, ctx=ctx)
        found = tuple(Path(one) if kind is Path else one for one in values)
        return found if takes_many else next(iter(found), None)

    return lambda: SimpleNamespace(coerce=coerce)


class Command(typer.core.TyperCommand):
    """A command whose usage errors are one line, as all others are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in (*args, os.getcwd()):
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                raise ConfigError(
                    f"{os.fsencode(word)!r}: this name is not UTF-8, which files of weights and of "
                    f"settings cannot hold; rename it"
                )
        _convert_plainly(self.get_params(ctx))
        try:
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            raise ConfigError(_usage_told(ctx, error)) from error


class FirstOnly(Command):
    """A command that the first process of a launch runs alone; the others end before they read it,
    unless they are asked for help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not set(ctx.help_option_names) & set(args):
            only_first()
        return super().parse_args(ctx, args)


class Group(typer.core.TyperGroup):
    """A group of commands; called without any it shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_alone = not args
        _convert_plainly(self.get_params(ctx))
        try:
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            if is_alone:
                raise
            raise ConfigError(_usage_told(ctx, error)) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known:
            raise ConfigError(f"no command {args[0]!r}{nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """The commands above; for the list of them none is built."""

    _lists_commands = False

    def list_commands(self, ctx: Any) -> list[str]:
        return COMMANDS

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if not self._lists_commands:
            return build(cmd_name)
        (panel,) = (title for title, lines in PANELS.items() if cmd_name in lines)
        line = PANELS[panel][cmd_name]
        return typer.core.TyperCommand(cmd_name, help=line, rich_help_panel=panel)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._lists_commands = True
        super().format_help(ctx, formatter)
        self._lists_commands = False


def _usage_told(context: Any, error: Any) -> str:
    """A usage error of Typer's on one line: the command, what is wrong, what to do."""
    command = context.command_path.partition(" ")[2]
    where = f"{command}: " if command else ""
    text = error.format_message().rstrip(".")
    text = text[0].lower() + text[1:]
    if hasattr(error, "possibilities"):
        text = f"no option {error.option_name}"
        if instead := _NOT_HERE.get(error.option_name):
            return f"{where}{text}: {instead}"
        name = error.option_name.lstrip("-").replace("-", "_")
        table = TABLES.get(HOME.get(command, command), Settings)
        if name in [item.name for item in fields(table) if not item.metadata["option"]]:
            return f"{where}{text}; set {name} under [{command}] in deme.toml"
        flags = [flag for item in context.command.params for flag in item.opts]
        if close := closest(error.option_name, [flag for flag in flags if flag[:2] == "--"]):
            return f"{where}{text}; did you mean {close}?"
    elif hasattr(error.__cause__, "errors"):  # pydantic's, which converts the values
        (first, *_) = error.__cause__.errors()
        expected = first["msg"].partition(",")[0].replace("Input should be", "expected")
        text = f"{error.param.opts[0]} {first['input']}: {expected}"
    return f"{where}{text}; see {' '.join(['deme', *command.split(), '--help'])}"


app = typer.Typer(
    **SETTINGS,
    name="deme",
    cls=LazyGroup,
    help="Decouple-then-Merge: one diffusion expert per range of timesteps, merged into one model.",
    epilog="Start with deme demo. Your own model: split, finetune, merge, eval, in this order.",
    no_args_is_help=True,
)


def show_version(asked: bool) -> None:
    """Print what decides the numbers, and stop. The first line comes at once, torch takes time."""
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


@app.callback()
def deme(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show versions and the device."
        ),
    ] = False,
) -> None:
    """Decouple-then-Merge: one diffusion expert per range of timesteps, merged into one model."""
