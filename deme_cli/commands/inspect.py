"""`deme inspect`: what artifacts say of themselves. Only --verify reads more than headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import deme_cli
from deme_cli import console
from deme_cli.artifacts import EXPORTED
from deme_cli.commands.options import argument, command, flag

if TYPE_CHECKING:
    from deme_cli import Inspected

_MOST_LINES, _WIDTH = 40, 92  # of a fact with many parts; columns of what is nested in one
_NOTHING: tuple[Any, ...] = (None, {}, [], ())
_UNSHOWN = ("created_by", "fingerprint", "model_config", "scheduler_config", "prompts")


@command()
def inspect(
    files: Annotated[list[Path], argument("FILE", "Artifacts, or other weights.")],
    verify: Annotated[
        bool, flag("--verify", "Recompute each fingerprint or hash; exit 4 if one differs.")
    ] = False,
    as_json: bool = False,
) -> None:
    """Show kind, size, fingerprint, range, norms, parents and coefficients of artifacts.

    Of an export, or a file that deme did not write: what it is, by its names.

    Example: deme inspect --verify base.safetensors
    """
    with console.showing() as progress:
        found = deme_cli.inspect(files, verify=verify, progress=progress)
    artifacts = [
        {
            "path": str(one.header.path),
            "kind": one.record.kind if one.record else "export" if one.made_of else "foreign",
            "parameters": one.header.num_parameters,
            "tensors": len(one.header.tensors),
            "fingerprint": one.record.fingerprint if one.record else None,
            "record": asdict(one.record) if one.record else _foreign(one),
        }
        for one in found
    ]
    if as_json:
        console.result_json({"artifacts": artifacts})
    else:
        print("\n\n".join(map(_as_text, artifacts)))


def _foreign(one: Inspected) -> dict[str, Any]:
    """What can be told of a file that is no artifact, in place of its record."""
    counts = Counter(spec.dtype for spec in one.header.tensors.values())
    made_of = one.made_of and f"{one.made_of.kind} {one.made_of.fingerprint}"
    told = {name: text for name, text in one.header.metadata.items() if name != EXPORTED}
    return {
        "what": one.foreign, **({"exported_from": made_of} if made_of else {}),
        "dtypes": dict(counts), "metadata": told, "use": one.todo,
    }  # fmt: skip


def _as_text(artifact: dict[str, Any]) -> str:
    """Facts in lines, the record's last; what no person reads is left to --json."""
    record = artifact["record"]
    if record.get("single_file"):
        parts = {"frozen_parts": record["source"]} if record["companions"] else {}
        record = {**record, "source": record["single_file"]["path"], **parts}
    facts = {"kind": artifact["kind"]}
    if artifact["tensors"]:
        facts["parameters"] = f"{artifact['parameters']:,} in {artifact['tensors']} tensors"
    if artifact["fingerprint"]:
        facts["fingerprint"] = artifact["fingerprint"]
    if model_config := record.get("model_config"):
        facts["model"] = str(model_config.get("_class_name", "unknown"))
    for name, value in record.items():
        if name not in _UNSHOWN and value is not None:
            facts[name.replace("_", " ")] = _as_fact(name, value)
    if created_by := record.get("created_by"):
        facts["created by"] = created_by
    width = max(map(len, facts))
    return "\n".join([artifact["path"], *(f"  {k:<{width}}  {text}" for k, text in facts.items())])


def _as_fact(name: str, value: Any) -> str:
    """A record's value on one line; one with parts over indented lines, of very many the first."""
    if name == "range":
        return f"{value[0]}:{value[1]}"
    if name == "coefficients":
        return ", ".join(f"{w:g}" for w in value)
    if name == "parents":
        lines = [
            f"{one['range'][0]}:{one['range'][1]}  {one['kind']}  {one['fingerprint'][:12]}  "
            f"{one['path']}"
            for one in value
        ]
    elif isinstance(value, dict):
        lines = [f"{k} = {_short(each)}" for k, each in value.items() if each not in _NOTHING]
    else:
        return _short(value)
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"… and {len(lines) - _MOST_LINES} more; --json has all"]
    return "".join(f"\n    {line}" for line in lines) or "none"


def _short(value: Any) -> str:
    """A value on one line: of what is nested the names and numbers, as far as they fit."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, (list, tuple, dict)):
        return str(value)
    named = value.items() if isinstance(value, dict) else (("", each) for each in value)
    parts = [(f"{name} ".lstrip(), each) for name, each in named if each not in _NOTHING]
    is_nested = any(isinstance(each, (list, tuple, dict)) for _, each in parts)
    text = ("; " if is_nested else ", ").join(name + _short(each)[:_WIDTH] for name, each in parts)
    return f"{text[:_WIDTH]} …" if len(text) > _WIDTH else text or "none"
