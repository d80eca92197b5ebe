"""What a setting is: a default, the sentence that explains it, the words it may take, its option.

A table of settings is a frozen dataclass that checks itself, so a config that exists is a config
that can run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from deme_cli.errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    flags: str = "",
    panel: str | None = None,
    parse: Callable[[str, str], Any] | None = None,
) -> Any:
    """A field with its one-sentence help and, for words, the words allowed.

    flags: of its option, separated by spaces, as `--num -n` or `--flip/--no-flip`; by default its
    name.   panel: where `--help` lists it.   parse: the value of a text on the command line and the
    flag before it, for what is more than one word or number.
    """
    metadata = {
        "help": help, "choices": tuple(choices), "flags": flags, "panel": panel, "parse": parse,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def help_of(item: Field[Any]) -> str:
    """The sentence for `--help`: what the setting means, its choices and its default."""
    text: str = item.metadata["help"]
    if item.metadata["choices"]:
        text += f" ({', '.join(item.metadata['choices'])})"
    if item.default not in (None, MISSING, ""):
        shown = str(item.default).lower() if isinstance(item.default, bool) else item.default
        text += f" [default: {shown}]"
    return text


def flags_of(item: Field[Any]) -> list[str]:
    """The flags of the option of a setting, the long one first, as `--flip/--no-flip`."""
    flags = item.metadata["flags"].split() or [f"--{item.name.replace('_', '-')}"]
    return sorted(flags, key=lambda flag: not flag.startswith("--"))


@dataclass(frozen=True)
class Settings:
    """Checks that hold for every table: the words are known and the types fit."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            choices = item.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{item.name} = {value!r}: expected one of {', '.join(choices)}")
        self.check()

    def check(self) -> None:
        """What the words alone cannot say; each table adds its own."""

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} = {value}: expected a number above 0")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} = {value}: expected 0 or more")


def parse_numbers(text: str, what: str) -> list[float]:
    """`0.1,0.2` as numbers. Raises ConfigError naming `what`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} {text!r}: expected numbers separated by commas") from error


def parse_lists(text: str, what: str) -> list[Any]:
    """`0,1` as one list for all, `0,1;0,2` as a list of lists."""
    lists = [parse_numbers(part, what) for part in text.split(";")]
    return lists if len(lists) > 1 else lists[0]
