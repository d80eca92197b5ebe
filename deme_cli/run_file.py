"""`deme.toml` as text: every setting with its sentence, live where it has a value of its own.

Settings left at their default are written as comments, so that a later default still holds.
`config.read_run_file` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from deme_cli.config import TABLES

_HEADER = """\
# Settings of a deme run, written by `deme split`, read by every command in this folder.
# The command line wins over this file, this file over the defaults (shown after `# `).
"""
# What an unset setting may look like, shown in its comment.
_EXAMPLES: dict[str, Any] = {
    "horizontal_flip": True,
    "coefficients": [0.25, 0.25, 0.25, 0.25],
    "grid": [0.0, 0.5, 1.0],
    "fid": "cifar10",
    "kid": "cifar10",
    "features": "inception",
}


def render_run_file(live: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a `deme.toml` in which the settings of `live` (by table) have values."""
    blocks = [_HEADER]
    for table, config in TABLES.items():
        title = (config.__doc__ or "").splitlines()[0].removeprefix(f"[{table}]: ")
        lines = [f"# {title}", f"[{table}]"]
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
