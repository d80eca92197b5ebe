"""`deme.toml`: read and checked for every command, written with comments by `split`.

Settings left at their default are written as comments, so that a later default still holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from deme_cli.config import CONFIG_NAME, TABLES, ModelConfig
from deme_cli.errors import ConfigError, MissingError, reading
from deme_cli.settings import FromFile, Settings, nearest

AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class RunFile:
    """A parsed `deme.toml`: its folder (paths in it are relative to that) and its tables.

    RunFile() is the run of somebody who has none: the current folder and the defaults.
    """

    folder: Path = Path(".")
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        tables = {
            table: {k: FromFile(v) if isinstance(v, list) else v for k, v in values.items()}
            for table, values in self.tables.items()
        }
        object.__setattr__(self, "tables", tables)

    def settings(self, config: type[AnySettings], **options: Any) -> AnySettings:
        """The config of one procedure; `options` are from the command line, None if not given.

        One that has no table, as those of the analyses, has its defaults.
        """
        table = next((name for name, kind in TABLES.items() if kind is config), "")
        given = {name: value for name, value in options.items() if value is not None}
        try:
            return config(**config.combine(self.tables.get(table, {}), given))
        except ConfigError as error:
            raise ConfigError(f"[{table}] {error}" if table else str(error)) from error

    def resolve(self, path: str) -> Path:
        """A path written in this file, seen from its folder."""
        return self.folder / path

    def seen(self, place: str) -> str:
        """A file as given, or, where nothing of that name is here, beside this `deme.toml`."""
        is_beside = not os.path.exists(place) and os.path.exists(self.resolve(place))  # or too long
        return str(self.resolve(place)) if is_beside else place

    def pipeline(self, given: str | None = None) -> str | None:
        """The folder or hub id of the frozen parts: as given, else that of this file, if any."""
        found = self.settings(ModelConfig, pipeline=given).pipeline
        return found if given or not found else self.seen(found)

    @property
    def base(self) -> Path:
        return self.resolve(self.settings(ModelConfig).base)


def read_run_file(path: Path | None) -> RunFile:
    """The `deme.toml` at `path`, or in the current folder; empty tables where there is none.

    Raises MissingError if a named file is absent, ConfigError on syntax, unknown keys, wrong types.
    """
    chosen = path or Path(CONFIG_NAME)
    if not chosen.exists():
        if path is not None:
            raise MissingError(f"{path}: no such file; `deme split` writes one")
        return RunFile()
    import tomli

    try:
        with reading(chosen):
            document = tomli.loads(chosen.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{chosen}: not valid TOML: {error}") from error
    except (ValueError, RecursionError) as error:  # Python's limits, of digits and of nesting
        raise ConfigError(
            f"{chosen}: a number of thousands of digits, or values nested as deeply; expected the "
            f"settings that `deme split` writes"
        ) from error
    for table, values in document.items():
        if table not in TABLES:
            raise ConfigError(f"{chosen}: unknown table [{table}]{nearest(table, TABLES)}")
        document[table] = checked_table(table, values, str(chosen))
    return RunFile(chosen.parent, document, chosen)


def checked_table(table: str, values: Any, where: str) -> dict[str, Any]:
    """The values of one table of settings; raises ConfigError on unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {table} should be a table, as in [{table}]")
    known = {item.name: str(item.type) for item in fields(TABLES[table])}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r} in [{table}]{nearest(key, known)}")
    return {
        key: _typed(value, known[key], f"{where}: [{table}] {key}") for key, value in values.items()
    }


def _is_huge(value: Any) -> bool:
    """Whether a value has an integer that TOML's 64 bits do not hold."""
    if isinstance(value, (list, dict)):
        return any(map(_is_huge, value.values() if isinstance(value, dict) else value))
    return type(value) is int and not -(1 << 63) <= value < 1 << 63


def _typed(value: Any, declared: str, where: str) -> Any:
    """A TOML value as the declared type; integers may stand for floats, nothing else converts."""
    names = {part.split("[")[0].strip() for part in declared.split("|")}
    if _is_huge(value):
        raise ConfigError(f"{where}: a number of more than 64 bits: expected {declared}")
    if type(value) is int and "float" in names and "int" not in names:
        return float(value)
    if type(value).__name__ not in names:
        raise ConfigError(f"{where} = {value!r}: expected {declared}")
    entry = declared.partition("list[")[2].partition("]")[0]
    if type(value) is list and entry != "Any":
        return [_typed(one, entry, where) for one in value]
    return value


_HEADER = """\
# Settings of a deme run, written by `deme split`, read by every command in this folder.
# The command line wins over this file, this file over the defaults (shown after `# `).
"""
# What an unset setting may look like, shown in its comment.
_EXAMPLES: dict[str, Any] = {
    "horizontal_flip": True,
    "coefficients": [0.25, 0.25, 0.25, 0.25],
    "grid": [0.0, 0.5, 1.0],
    "bounds": [-0.5, 1.5],
    "start": [0.25, 0.25, 0.25, 0.25],
    "evaluations": 100,
    "loss_range": "250:500",
    "time": "30m",
    "report": True,
    "report_num": 2048,
    "fid": "cifar10",
    "kid": "cifar10",
    "features": "inception",
    "pipeline": "path/to/pipeline",
    "captions": "text",
    "resolution": 512,
    "ema_lengths": [0.05, 0.1],
    "snapshot_every": 1000,
    "micro_batch": 16,
    "weighting_gamma": 5.0,
    "num": 1000,
    "resize": 256,
    "guidance": 7.5,
    "prompts": "prompts.txt",
    "prompt_column": "prompt",
    "classes": "0-9",
}


def render_run_file(
    live: Mapping[str, Mapping[str, Any]], *, remarks: Mapping[str, str] | None = None
) -> str:
    """The text of a `deme.toml` in which the settings of `live` (by table) have values.

    remarks: comments of whole lines, by the table that they stand above.
    """
    blocks = [_HEADER]
    for table, config in TABLES.items():
        title = (config.__doc__ or "").splitlines()[0].removeprefix(f"[{table}]: ")
        lines = [f"{(remarks or {}).get(table, '')}# {title}", f"[{table}]"]
        for item in fields(config):
            lines += _setting(item, live.get(table, {}))
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _setting(item: Field, values: Mapping[str, Any]) -> Iterator[str]:
    """A setting's sentence and its line: live if `values` has it, else its default in a comment."""
    choices = item.metadata["choices"]
    yield f"# {item.metadata['help']}" + (f" ({', '.join(choices)})" if choices else "")
    if item.name in values:
        yield f"{item.name} = {_toml(values[item.name])}"
    else:
        yield f"# {item.name} = {_toml(_shown_default(item))}"


def _shown_default(item: Field) -> Any:
    if item.default not in (None, MISSING):
        return item.default
    if item.metadata["choices"]:
        return item.metadata["choices"][0]
    return _EXAMPLES.get(item.name, "")


def _toml(value: Any) -> str:
    """A value in TOML; its strings, numbers and arrays are written as in JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
