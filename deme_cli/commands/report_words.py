"""The words of a command line: flags of a command's own options, values, names, quoting."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from deme_cli.reporting.tables import public_name
from deme_cli.run_file import RunFile
from deme_cli.settings import Settings

Names = Mapping[str, str]  # of the files of a folder, by fingerprint
_WIDTH = 88  # of a line, before it is continued on the next


def command_line(words: Sequence[str]) -> str:
    """Words as a shell reads them, over several lines where they are many."""
    lines, current = [], "deme"
    for group in _groups(words):
        text = shlex.join(group)
        if len(current) + len(text) + 1 > _WIDTH and current.strip() != "deme":
            lines.append(f"{current} \\")
            current = "   "
        current += f" {text}"
    return "\n".join([*lines, current])


def _groups(words: Sequence[str]) -> Iterator[list[str]]:
    """Flags with their values, other words alone."""
    group: list[str] = []
    for word in words:
        if group and (len(group) > 1 or word.startswith("-") or not group[0].startswith("-")):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def flags_of(command: Callable[..., Any]) -> dict[str, list[str]]:
    """Every option of a command by its parameter: `--lr`, or `--flip` and `--no-flip`."""
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(command)
    return {
        option.name: [*sorted(option.opts, key=len)[-1:], *option.secondary_opts]
        for option in typer.main.get_command(app).params
        if option.param_type_name == "option"
    }


def option_words(flags: Sequence[str], value: Any) -> list[str]:
    """One option as words; a list joined by commas, those in it by semicolons."""
    if isinstance(value, bool):
        return [flags[0]] if value else list(flags[1:2])
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(entry, (list, tuple)) for entry in value)
        parts = [",".join(map(word, v)) if nested else word(v) for v in value]
        return [flags[0], (";" if nested else ",").join(parts)]
    return [flags[0], word(value)]


def word(value: Any) -> str:
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return public_name(str(value))


def path_word(name: str) -> str:
    """A file that no command takes for an option, of an absolute path the last part."""
    name = public_name(name)
    return f"./{name}" if name.startswith("-") else name


def setting_words(
    command: Callable[..., Any], kind: type[Settings], run: RunFile, values: Mapping[str, Any],
    *, renamed: Mapping[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """The options for those settings of `kind` that the command would not have by itself."""
    flags, renamed = flags_of(command), renamed or {}
    given = run.settings(kind)
    words = []
    for item in fields(kind):
        option = renamed.get(item.name, item.name)
        if item.name not in values or option not in flags:
            continue
        value = values[item.name]
        default = None if item.default is MISSING else item.default
        if value is not None and (value != default or value != getattr(given, item.name)):
            words += option_words(flags[option], value)
    return words


def output_words(name: str, usual: str) -> list[str]:
    """Where it was written, unless that is where it goes by itself."""
    return [] if name == usual else ["-o", path_word(name)]
