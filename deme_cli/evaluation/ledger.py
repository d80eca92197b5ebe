"""What an unfinished `deme eval` has measured, so that the same command goes on where it stopped.

A small JSON file beside the run, named by everything its figures depend on; it goes when the run is
finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deme_cli.evaluation.measure import Measured
from deme_cli.files import write_whole


class Ledger:
    """Measurements of one run. `identity` is JSON: all cards, counts and seeds of the run.

    Where the folder takes no files nothing is kept, and a stopped run begins anew.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.path = folder / f".deme-eval-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        self._writable = os.access(folder, os.W_OK)
        self._records = self._read()

    def _read(self) -> list[Measured]:
        try:
            return [Measured(**entry) for entry in json.loads(self.path.read_text())]
        except (OSError, ValueError, TypeError):
            return []  # absent, or written by a run that was killed: measure again

    def find(self, row: str, repeat: int) -> Measured | None:
        """What was measured of a row in a repeat, if it was."""
        return next((r for r in self._records if (r.row, r.repeat) == (row, repeat)), None)

    def keep(self, record: Measured) -> None:
        self._records.append(record)
        if self._writable:
            text = json.dumps([asdict(record) for record in self._records])
            write_whole(self.path, [text.encode()])

    def close(self) -> None:
        """The run is finished: nothing needs to be kept."""
        self.path.unlink(missing_ok=True)
