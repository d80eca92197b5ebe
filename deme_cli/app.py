"""The Typer app: every subcommand, grouped as they are used; each is imported when it is called.

Building twelve commands with their options costs more than the rest of `deme --help`, so what it
lists is a table here, and a command is built when somebody runs it or asks for its help. Typer has
no public names for the classes of contexts and commands that its own methods take: these are `Any`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Annotated, Any, cast

import typer
import typer.core
import typer.main

from deme_cli.analysis.settings import ANALYSES
from deme_cli.commands.launching import only_first
from deme_cli.commands.version import show_version
from deme_cli.config import TABLES
from deme_cli.errors import ConfigError
from deme_cli.settings import Settings, closest, nearest

SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "rich_markup_mode": "rich",
}
_PLAIN_WORDS = {  # pydantic's and ours
    "Input should be a valid integer": "expected a whole number",
    "Input should be a valid": "expected a",
    "Input should be": "expected a number",
}
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__base__)  # Typer has no public name for it
PIPELINE, MEASURE, LOOK = "Pipeline", "Sample and measure", "Look and share"


class Command(typer.core.TyperCommand):
    """A command whose usage errors are one line, as all others are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in (*args, os.getcwd()):
            if any("\ud800" <= letter <= "\udfff" for letter in word):
                raise ConfigError(
                    f"{os.fsencode(word)!r}: this name is not UTF-8, which files of weights and of "
                    f"settings cannot hold; rename it"
                )
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


def _usage_told(context: Any, error: Any) -> str:
    """A usage error of Typer's on one line: the command, what is wrong, what to do."""
    command = context.command_path.partition(" ")[2]
    where = f"{command}: " if command else ""
    text = error.format_message().rstrip(".")
    text = text[0].lower() + text[1:]
    if hasattr(error, "possibilities"):
        items = context.command.params
        flags = [flag for item in items for flag in (*item.opts, *item.secondary_opts)]
        text = f"no option {error.option_name}"
        name = error.option_name.lstrip("-").replace("-", "_")
        table = TABLES.get({"ensemble-sample": "sample"}.get(command, command))
        if name in [item.name for item in fields(table or Settings) if not item.metadata["option"]]:
            return f"{where}{text}; set {name} under [{command}] in deme.toml"
        if close := closest(error.option_name, [flag for flag in flags if flag.startswith("--")]):
            return f"{where}{text}; did you mean {close}?"
    elif hasattr(error.__cause__, "errors"):  # pydantic's, which converts the values
        (first, *_) = error.__cause__.errors()
        expected = first["msg"].partition(",")[0]
        for theirs, ours in _PLAIN_WORDS.items():
            expected = expected.replace(theirs, ours)
        text = f"{error.param.opts[0]} {first['input']}: {expected}"
    return f"{where}{text}; see {' '.join(['deme', *command.split(), '--help'])}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A subcommand: its panel, its line in `deme --help`, and its function in commands/.

    A group's function is its help alone; each of its `parts` is a subcommand, the
    function of its name beside it.
    """

    panel: str
    summary: str
    function: str
    module: str = ""
    parts: Collection[str] = ()

    def build(self, name: str) -> Any:
        """Import the command and make its options."""
        module = import_module(f"deme_cli.commands.{self.module or self.function}")
        one = typer.Typer(
            **SETTINGS, cls=Group, add_completion=False, no_args_is_help=bool(self.parts)
        )
        function = getattr(module, self.function)
        if not self.parts:
            one.command(name, cls=_kind(self.function), rich_help_panel=self.panel)(function)
            return typer.main.get_command(one)
        one.callback()(function)
        for part in self.parts:
            one.command(part, cls=_kind(part))(getattr(module, part.replace("-", "_")))
        return typer.main.get_command(one)

    def line(self, name: str) -> typer.core.TyperCommand:
        """What stands in the list of commands, without the command."""
        return typer.core.TyperCommand(name, help=self.summary, rich_help_panel=self.panel)


def _kind(function: str) -> type[Command]:
    return Command if function in JOINT else FirstOnly


# What the processes of a launch do together, by function: each of these meets the others itself.
JOINT = frozenset({
    "finetune", "merge", "sample", "ensemble_sample", "evaluate", "stats",
})  # fmt: skip
COMMANDS: dict[str, Entry] = {
    "split": Entry(PIPELINE, "Import a model, divide its timesteps into ranges.", "split"),
    "finetune": Entry(PIPELINE, "Train the expert of one range (Eq. 3-6).", "finetune"),
    "task-vector": Entry(
        PIPELINE, "Subtract the base from experts; norms, cosines.", "task_vector"
    ),
    "merge": Entry(PIPELINE, "Merge experts into one model (Eq. 8).", "merge"),
    "sample": Entry(MEASURE, "Draw images from one model.", "sample"),
    "ensemble-sample": Entry(
        MEASURE, "Draw images, each expert in its range (Eq. 7).", "ensemble_sample"
    ),
    "eval": Entry(MEASURE, "Measure the distance to reference images.", "evaluate", "eval"),
    "stats": Entry(MEASURE, "Make reference statistics of images.", "stats"),
    "compare": Entry(MEASURE, "Train and measure a table of methods.", "compare"),
    "demo": Entry(LOOK, "Run the whole pipeline on the embedded digits.", "demo"),
    "analyze": Entry(LOOK, "Draw the paper's figures: why it works.", "analyze", parts=ANALYSES),
    "report": Entry(LOOK, "Put a run folder on one HTML page.", "report"),
    "inspect": Entry(LOOK, "Show what is in an artifact, and where it is from.", "inspect"),
    "export": Entry(LOOK, "Write a diffusers pipeline folder.", "export"),
    "doctor": Entry(LOOK, "List what runs need, and what of it is missing.", "doctor"),
}


class LazyGroup(Group):
    """A group that knows its commands by the table above and builds the one that is called."""

    _lists_commands = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        return entry.line(cmd_name) if self._lists_commands else entry.build(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._lists_commands = True
        super().format_help(ctx, formatter)
        self._lists_commands = False


app = typer.Typer(
    **SETTINGS,
    name="deme",
    cls=LazyGroup,
    help="Decouple-then-Merge: one diffusion expert per range of timesteps, merged into one model.",
    epilog="Start with deme demo. Your own model: split, finetune, merge, eval, in this order.",
    no_args_is_help=True,
)


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
