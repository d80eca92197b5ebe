"""`deme inspect`: what artifacts say of themselves. Only --verify reads more than headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
from deme_cli.api import inspecting
from deme_cli.api.inspecting import Inspected
from deme_cli.commands.options import Json, Quiet

Files = Annotated[
    list[Path], typer.Argument(metavar="FILE", help="Artifacts of any kind.", show_default=False)
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Recompute each fingerprint; exit 4 if one differs.")
]


_UNSHOWN = ("created_by", "fingerprint", "model_config", "scheduler_config", "prompts")


def inspect(
    files: Files, verify: Verify = False, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Show kind, size, fingerprint, range, norms, parents and coefficients of artifacts.

    Example: deme inspect --verify base.safetensors
    """
    console.set_quiet(quiet)
    artifacts = [_describe(one) for one in inspecting.inspect(files, verify=verify)]
    if as_json:
        console.result_json({"artifacts": artifacts})
    else:
        print("\n\n".join(_as_text(artifact) for artifact in artifacts))


def _describe(one: Inspected) -> dict[str, Any]:
    """One artifact as the JSON document shows it."""
    return {
        "path": str(one.header.path),
        "kind": one.record.kind,
        "parameters": one.header.num_parameters,
        "tensors": len(one.header.tensors),
        "fingerprint": one.record.fingerprint,
        "record": asdict(one.record),
    }


def _as_text(artifact: dict[str, Any]) -> str:
    """One artifact for a person: a line per fact, model and scheduler configs left to --json."""
    record = artifact["record"]
    facts = {
        "kind": artifact["kind"],
        "parameters": f"{artifact['parameters']:,} in {artifact['tensors']} tensors",
        "fingerprint": artifact["fingerprint"],
    }
    if model_config := record.get("model_config"):
        facts["model"] = str(model_config.get("_class_name", "unknown"))
    for name, value in record.items():
        if name not in _UNSHOWN and value is not None:
            facts[name.replace("_", " ")] = _as_fact(name, value)
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {text}" for name, text in facts.items()]
    return "\n".join(
        [artifact["path"], *lines, f"  {'created by':<{width}}  {record['created_by']}"]
    )


def _as_fact(name: str, value: Any) -> str:
    """A record's value on one line; long ones over indented lines."""
    if name == "range":
        return f"{value[0]}:{value[1]}"
    if name == "coefficients":
        return ", ".join(f"{w:g}" for w in value)
    if name == "parents":
        return _lines(
            f"{parent['range'][0]}:{parent['range'][1]}  {parent['kind']}  "
            f"{parent['fingerprint'][:12]}  {parent['path']}"
            for parent in value
        )
    if isinstance(value, dict):
        return _lines(f"{key} = {_short(entry)}" for key, entry in value.items())
    return _short(value)


def _lines(lines: Iterable[str]) -> str:
    """Lines below the fact's name, indented."""
    return "".join(f"\n    {line}" for line in lines) or "none"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
