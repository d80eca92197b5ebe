"""What every analysis does around its measuring: checks, progress, what is kept, its files.

An analysis is a function `analyze_…` in a file of its own. It checks first what headers and
settings tell, measures, draws, and writes a JSON file with the picture beside it. Every document
has `schema_version`, `kind`, `reading` (a headline) and `protocol`; the rest is its own.
Needs no torch before something is measured.
"""

from __future__ import annotations

import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.analysis.settings import SPLITS
from deme_cli.artifacts import Record
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.console import SCHEMA_VERSION, Progress, Step
from deme_cli.errors import ConfigError, MissingError
from deme_cli.files import require_output, write_whole
from deme_cli.jobs import StopRequests, claim
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, split_uniform

_KEEP_SECONDS = 30.0  # between two writings of what is kept
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Analysis:
    """What an analysis measured: its file, the picture of it, a headline and a table.

    document: what the file holds.   facts: what `deme analyze … --json` tells of it.   After a dry
    run all but `path` and `facts` is empty.
    """

    path: Path
    reading: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """The files that were written."""
        return [self.path, self.path.with_suffix(".png")] if self.document else []


def check_output(output: Path, *, force: bool) -> None:
    """Check that the output is free or `force`; its picture is drawn over."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    require_output(output, force=force)
    require_output(output.with_suffix(".png"), force=True)


def check_inputs(
    output: Path, images: DataConfig | None, run: RunFile, *, split: str, force: bool
) -> DataConfig:
    """Which images are looked at, those of `run` if None; found before torch is imported."""
    from deme_cli.data.image_source import find_image_source

    check_output(output, force=force)
    if split not in SPLITS:
        raise ConfigError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    images = images or run.settings(DataConfig)
    if not images.source:
        raise ConfigError("no images: set [data] source in deme.toml, or use --data")
    find_image_source(images.source)
    return images


def peek(model: str) -> tuple[Record | None, int | None]:
    """The record of a model that is a file, and its T where files tell it; torch is not needed."""
    from deme_cli.diffusion.model_files import locate_model, peek_timesteps
    from deme_cli.evaluation.references import record_of_file

    whole = peek_timesteps(locate_model(model))
    return record_of_file(model), whole


def own_base(run: RunFile) -> str:
    """The base of deme.toml. Raises MissingError where there is none."""
    if not run.base.exists():
        raise MissingError(
            f"{run.base}: no base there; make one with `deme split`, or correct [model] base"
        )
    return str(run.base)


def ranges_of(
    run: RunFile, records: Sequence[Any], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """The ranges that are told apart: `n` equal ones, else those of the split.

    A split that lacks the range of an expert among `records` is not theirs; then it is the experts'
    own. Raises ConfigError where one reaches past T.
    """
    from deme_cli.evaluation.rows import is_partial

    if n is not None:
        return split_uniform(n, num_train_timesteps)
    split = run.settings(SplitConfig)
    ranges = split.timestep_ranges or split_uniform(split.n, num_train_timesteps)
    parts = {record.timesteps for record in records if is_partial(record)}
    if not parts <= set(ranges):
        ranges = sorted(parts)
    if past := next((span for span in ranges if span.stop > num_train_timesteps), None):
        raise ConfigError(
            f"[split] ranges: {past} reaches past the {num_train_timesteps} timesteps of this "
            f"model; correct deme.toml, or give -n"
        )
    return list(ranges)


@dataclass
class Kept:
    """The arrays that were measured so far, by the name of a unit of work; see `keeping`."""

    _path: Path
    _identity: str
    _requests: StopRequests
    _step: Step
    _progress: Progress
    _units: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self._path.exists():
            self._restore()

    def unit(self, name: str, size: int, measure: Callable[[], Arrays]) -> Arrays:
        """What `measure` gives, now or before, as `size` of all the work."""
        is_new = name not in self._units
        if is_new:
            self.check()
            self._progress(self._step)
            self._units[name] = dict(measure())
        self._step = replace(self._step, done=self._step.done + size)
        if is_new:
            self._progress(self._step)
        return self._units[name]

    def check(self, *_: int) -> None:
        """To be called within a unit: saves now and then, and before it raises Stopped."""
        if self._requests.asked or time.monotonic() - self._saved > _KEEP_SECONDS:
            stream, arrays = io.BytesIO(), {"identity": np.array(self._identity)}
            for unit, measured in self._units.items():
                arrays |= {f"{unit}|{name}": array for name, array in measured.items()}
            np.savez(stream, **arrays)  # type: ignore[arg-type]
            write_whole(self._path, [stream.getvalue()])
            self._saved = time.monotonic()
        if self._requests.asked:
            done = f"{self._step.done} of {self._step.total} {self._step.unit}s"
            text = f"stopped after {done}; run the same command again to go on"
            raise self._requests.stopped(text)

    def _restore(self) -> None:
        note = "what was measured before was of other settings; measuring all of it anew"
        try:
            with np.load(self._path) as file:
                if file["identity"] == self._identity:
                    for key in set(file) - {"identity"}:
                        unit, _, name = key.partition("|")
                        self._units.setdefault(unit, {})[name] = file[key]
                    note = f"continuing after {len(self._units)} parts measured before"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self._units, note = {}, "what was measured before cannot be read; measuring it anew"
        self._progress(Step(note=note))


@contextmanager
def keeping(
    output: Path, identity: Mapping[str, Any], label: str, unit: str, total: int,
    *, progress: Progress, force: bool,
) -> Iterator[Kept]:  # fmt: skip
    """What is measured lies in a hidden file beside `output` until that is written.

    So the same call goes on where it stopped, unless `force`. identity: all that decides the
    numbers; what was kept under another is not used. No other process writes `output` meanwhile.
    """
    with claim(output), StopRequests() as requests:
        path = output.parent / f".{output.stem}.unfinished"
        if force:
            path.unlink(missing_ok=True)
        step, said = Step(0, total, label, unit), json.dumps(plain(identity), sort_keys=True)
        yield Kept(path, said, requests, step, progress)
        path.unlink(missing_ok=True)


def write_analysis(
    output: Path, kind: str, document: Mapping[str, Any], picture: bytes, *, shown: Sequence[str],
    columns: Sequence[str], rows: Sequence[Sequence[str]],
) -> Analysis:  # fmt: skip
    """Write the picture, then the file, which says that all is done.

    Its reading and what is `shown` of the document are its facts.
    """
    content = document_bytes(kind, document)
    write_whole(output.with_suffix(".png"), [picture])
    write_whole(output, [content])
    written = json.loads(content)
    facts = {name: written[name] for name in ("reading", *shown)}
    return Analysis(output, written["reading"], columns, rows, written, facts)


def document_bytes(kind: str, document: Mapping[str, Any]) -> bytes:
    """The document as JSON, one line per row of a table; what is not finite becomes null."""
    whole = {"schema_version": SCHEMA_VERSION, "kind": kind, **document}
    lines = ",\n".join(f"  {json.dumps(name)}: {_text(plain(v))}" for name, v in whole.items())
    return f"{{\n{lines}\n}}\n".encode()


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


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
