"""The JSON file of an analysis: what was measured, and in one sentence what it says.

Every document has `schema_version`, `kind` (the name of the analysis), `reading` and `protocol`
(model, data, seed, numbers of draws); the rest is the analysis's own. `deme report` shows the
reading beside the picture of the same name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


def document_bytes(kind: str, reading: str, protocol: dict[str, Any], **found: Any) -> bytes:
    """The document as JSON, one line per row of a table; what is not finite becomes null."""
    document = {
        "schema_version": SCHEMA_VERSION, "kind": kind, "reading": reading,
        "protocol": protocol, **found,
    }  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(k)}: {_text(plain(v))}" for k, v in document.items())
    return f"{{\n{lines}\n}}\n".encode()


def plain(value: Any) -> Any:
    """`value` in JSON's own types: numpy as lists, what is not finite as null, paths as texts."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


def picture_paths(output: Path) -> list[Path]:
    """Where the pictures of a document lie: beside it, under its name."""
    return [output.with_suffix(suffix) for suffix in (".png", ".svg")]
