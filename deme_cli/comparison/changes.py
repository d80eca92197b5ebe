"""What changed in a row since it was finished: it lies in another folder now, and is made anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deme_cli.comparison.jobs import DONE_NAME, SETTINGS_NAME, RowJobs, slug

_SHOWN = 3


def change_of(jobs: RowJobs) -> str | None:
    """A sentence on the settings that differ from those of an earlier result; None if none do.

    The earlier result stays where it is.
    """
    missing = [job for job in jobs.results.values() if not job.is_done]
    if not missing:
        return None
    own = missing[0].folder.parent
    earlier = [
        folder
        for folder in sorted(own.parent.glob(f"{slug(jobs.row.name)}-????????"), key=_age)
        if folder != own and _is_of(folder, jobs.row.name)
    ]
    if not earlier:
        return None
    now = _flat(json.loads(missing[0].files[SETTINGS_NAME])) | _training(jobs)
    before = _settings(next(earlier[-1].glob("*")))
    differing = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
    shown = [f"{key} {before.get(key)} -> {now.get(key)}" for key in differing[:_SHOWN]]
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return (
        f"{jobs.row.name}: finished before with other settings ({', '.join(shown)}{more}); "
        f"made anew, what was measured then stays in {earlier[-1]}"
    )


def _is_of(folder: Path, row: str) -> bool:
    """Whether a finished result of this row lies in `folder`; other names may look alike."""
    for done in folder.glob(f"*/{DONE_NAME}"):
        try:
            return json.loads(done.with_name(SETTINGS_NAME).read_text())["row"] == row
        except (OSError, ValueError, KeyError):  # removed by hand, or of another version
            return False
    return False


def _age(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.glob(f"*/{DONE_NAME}")), default=0.0)


def _training(jobs: RowJobs) -> dict[str, Any]:
    for job in jobs.trainings.values():
        return _flat(json.loads(job.files[SETTINGS_NAME]))
    return {}


def _settings(folder: Path) -> dict[str, Any]:
    """Everything that decided what lies in a result folder, its training's settings with it."""
    try:
        own = json.loads((folder / SETTINGS_NAME).read_text())
        found = _flat(own)
        place = folder.parent.parent.parent / "trainings" / own["training"]
        for path in sorted(place.glob(f"*/{SETTINGS_NAME}"))[:1]:
            found |= _flat(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError):  # removed by hand, or of another version
        return {}
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by name, those of a table as `table.name`; without what is no setting."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name == "measures":
            for one in value:
                own = {table: one[table] for table in ("sample", "eval")}
                flat |= _flat(own, f"{one['name']} " if one["name"] else "")
        elif isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name not in ("training", "row"):
            flat[prefix + name] = value
    return flat
