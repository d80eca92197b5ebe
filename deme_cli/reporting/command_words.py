"""The words of a command line: flags of settings, values, names, quoting."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from deme_cli.reporting.tables import public_name
from deme_cli.run_file import RunFile
from deme_cli.settings import Settings, flags_of

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


def option_words(flag: str, value: Any) -> list[str]:
    """One option as words; a list joined by commas, those in it by semicolons."""
    if isinstance(value, bool):
        on, _, off = flag.partition("/")
        return [told for told in [on if value else off] if told]
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(entry, (list, tuple)) for entry in value)
        parts = [",".join(map(word, v)) if nested else word(v) for v in value]
        return [flag, (";" if nested else ",").join(parts)]
    return [flag, word(value)]


def word(value: Any) -> str:
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return public_name(str(value))


def path_word(name: str) -> str:
    """A file that no command takes for an option, of an absolute path the last part."""
    name = public_name(name)
    return f"./{name}" if name.startswith("-") else name


def setting_words(kind: type[Settings], run: RunFile, values: Mapping[str, Any]) -> list[str]:
    """The options for those settings of `kind` that a command would not have by itself."""
    given = run.settings(kind)
    words = []
    for item in fields(kind):
        value = values.get(item.name)
        default = None if item.default is MISSING else item.default
        has_option = item.metadata["option"]
        if (
            has_option
            and value is not None
            and (value != default or value != getattr(given, item.name))
        ):
            words += option_words(flags_of(item)[0], value)
    return words


def output_words(name: str, usual: str) -> list[str]:
    """Where it was written, unless that is where it goes by itself."""
    return [] if name == usual else ["-o", path_word(name)]
