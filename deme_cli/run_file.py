"""`deme.toml`: read and checked for every command, written with comments by `split`.

Settings left at their default are written as comments, so that a later default still holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from deme_cli.artifacts import BaseRecord, record_of
from deme_cli.config import CONFIG_NAME, TABLES, FromFile, ModelConfig, Settings
from deme_cli.errors import (
    ArtifactError,
    ConfigError,
    MissingError,
    nearest,
    reading,
    shown,
)
from deme_cli.files import read_header

AnySettings = TypeVar("AnySettings", bound=Settings)
# What a declared type is called, and what an unset setting of it may look like.
_TYPES: dict[str, tuple[str, Any]] = {
    "bool": ("true or false", True),
    "float": ("a number", 1.0),
    "int": ("a whole number", 1),
    "list[Any]": ("a list", [0.0, 1.0]),
    "dict[str, Any]": ("a table", {}),
    "list[float]": ("a list of numbers", [0.1, 0.2]),
    "list[int]": ("a list of whole numbers", [0, 1]),
    "list[str]": ("a list of texts in quotes", ["0:500", "500:1000"]),
    "str": ("a text in quotes", ""),
}


@dataclass(frozen=True)
class RunFile:
    """A parsed `deme.toml`: its folder (paths in it are relative to that) and its tables.

    RunFile() is the run of somebody who has none: the current folder and the defaults.
    """

    folder: Path = Path(".")
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: Path | None = None

    def settings(self, config: type[AnySettings], **options: Any) -> AnySettings:
        """The config of one procedure; `options` are from the command line, None if not given.

        One that has no table, as those of the analyses, has its defaults.
        """
        table = next((name for name, kind in TABLES.items() if kind is config), "")
        values = dict(self.tables.get(table, {}))
        given = {name: value for name, value in options.items() if value is not None}
        for item in fields(config):
            if given.get(item.name, item.default) != item.default:
                values.pop(item.metadata["instead_of"], None)
        try:
            return config(**values | given)
        except ConfigError as error:
            raise ConfigError(f"[{table}] {error}" if table else str(error)) from error

    def seen(self, place: str) -> str:
        """A file as given, or, where nothing of that name is here, beside this `deme.toml`."""
        beside = os.path.join(self.folder, place)  # os.path: a name may be too long for a file
        return beside if not os.path.exists(place) and os.path.exists(beside) else place

    def pipeline(self, given: str | None = None) -> str | None:
        """The folder or hub id of the frozen parts: as given, else that of this file, if any."""
        found = self.settings(ModelConfig, pipeline=given).pipeline
        return found if given or not found else self.seen(found)

    @property
    def base(self) -> Path:
        return self.folder / self.settings(ModelConfig).base


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
    except (ValueError, RecursionError) as error:  # of tomli, of UTF-8, and Python's limits
        raise ConfigError(f"{chosen}: not valid TOML: {error}") from error
    for table, values in document.items():
        if table not in TABLES:
            raise ConfigError(f"{chosen}: unknown table [{table}]{nearest(table, TABLES)}")
        document[table] = checked_table(table, values, str(chosen))
    return RunFile(chosen.parent, document, chosen)


_NAMED = "name it with --base (for sample, eval and export: base in [model] of deme.toml)"


def locate_base(
    path: Path, wanted: str, run: RunFile, given: Path | None, beside: Path | None = None
) -> Path:
    """The base of the artifact at `path`: `given`, else the run's, else one beside it.

    wanted: its fingerprint.   beside: another folder to look in.   Raises ArtifactError if what is
    found is another base, MissingError if nothing is found.
    """
    places = [given] if given else [run.base]
    for folder in () if given else dict.fromkeys((beside, path.parent)):
        if folder is not None:
            places += [folder / ModelConfig.base, *sorted(folder.glob("*base*.safetensors"))]
    others = []
    for place in filter(Path.is_file, places):
        record = record_of(read_header(place))
        if isinstance(record, BaseRecord) and record.fingerprint == wanted:
            return place
        others.append(f"{place} ({record.kind} {record.fingerprint[:12]})")
    if others:
        raise ArtifactError(
            f"{path}: was finetuned from base {wanted[:12]}, found "
            f"{', '.join(dict.fromkeys(others))}; put the right one beside it, or {_NAMED}"
        )
    raise MissingError(
        f"{given or run.base}: no such file; {path} was finetuned from base "
        f"{wanted[:12]}; put it beside the file, or {_NAMED}"
    )


def checked_table(table: str, values: Any, where: str) -> dict[str, Any]:
    """The values of one table of settings; raises ConfigError on unknown keys and wrong types."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {table} should be a table, as in [{table}]")
    return checked_fields(TABLES[table], values, where, f"[{table}]")


def checked_fields(
    kind: type, values: Mapping[str, Any], where: str, table: str = ""
) -> dict[str, Any]:
    """What a dataclass of this kind may be made of; raises as `checked_table` does."""
    known = {item.name: str(item.type).removesuffix(" | None") for item in fields(kind)}
    for key in values:
        if key not in known:
            inside = f" in {table}" if table else ""
            raise ConfigError(f"{where}: unknown key {key!r}{inside}{nearest(key, known)}")
    return {
        key: _typed(value, known[key], f"{where}: {f'{table} {key}'.strip()}")
        for key, value in values.items()
    }


def _typed(value: Any, declared: str, where: str) -> Any:
    """A TOML value as the declared type; integers may stand for floats, nothing else converts."""
    if type(value) is int and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{where}: a number of more than 64 bits")
    if type(value) is int and declared == "float":
        return float(value)
    name, _, entry = declared.removesuffix("]").partition("[")
    if declared != "Any" and type(value).__name__ != name:
        expected = _TYPES.get(declared, (declared,))[0]
        raise ConfigError(f"{where} = {shown(value)}: expected {expected}")
    if isinstance(value, list):
        return FromFile(_typed(one, entry or "Any", where) for one in value)
    return value


_HEADER = """\
# Settings of a deme run, written by `deme split`, read by every command in this folder.
# The command line wins over this file, this file over the defaults (shown after `# `).
"""


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
            choices, values = item.metadata["choices"], live.get(table, {})
            lines.append(f"# {item.metadata['help']}" + f" ({', '.join(choices)})" * bool(choices))
            default = item.default
            if default is None:  # a word that may be chosen, or a value like one
                default = (*choices, _TYPES[str(item.type).removesuffix(" | None")][1])[0]
            value = json.dumps(values.get(item.name, default), ensure_ascii=False)
            value = value.replace("\x7f", "\\u007f")  # as TOML has it
            lines.append(f"{'' if item.name in values else '# '}{item.name} = {value}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)
