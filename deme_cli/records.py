"""The typed record in each artifact's header: what it is, where it came from, what it belongs to.

A record is JSON in the safetensors metadata under the key `deme`, so reading one needs no tensor
and no torch. There are six kinds. Fields absent from a file fail by name; unknown fields of a newer
minor version are ignored; a newer `version` is refused. The text ends in a digest of itself
(seal.py): a damaged record is refused wherever it is read.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar

from deme_cli import __version__
from deme_cli.errors import ArtifactError
from deme_cli.seal import require_intact, sealed
from deme_cli.timesteps import TimestepRange

VERSION = 1
_SHOWN = 80  # characters of a foreign value that a message shows


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every artifact says of itself. `fingerprint` is set by the writer."""

    kind: ClassVar[str] = ""
    fingerprint: str = ""
    created_by: str = f"deme {__version__}"

    def to_json(self) -> str:
        return sealed(json.dumps({"kind": self.kind, "version": VERSION, **asdict(self)}))


@dataclass(frozen=True, kw_only=True)
class DenoiserRecord(Record):
    """Any artifact whose tensors are a denoiser's, or differences of them.

    `model_config` is the diffusers config (with `_class_name`), `scheduler_config` likewise.
    `companions` holds the SHA-256 of each frozen part of the pipeline around the denoiser (VAE,
    text encoders, tokenizers), by its name; empty for models that draw pixels from noise alone.
    """

    source: str
    model_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    num_train_timesteps: int
    companions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BaseRecord(DenoiserRecord):
    """The starting point. `training` holds the settings where deme trained it from scratch."""

    kind: ClassVar[str] = "base"
    training: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertRecord(DenoiserRecord):
    """A denoiser finetuned on one range. `base` is the fingerprint of what it started from.

    `projection` is `block`, `fold` or `none`; an expert trained with `fold` is already folded.
    `training` holds every setting; `data` names the images and their fingerprint.
    """

    kind: ClassVar[str] = "expert"
    range: list[int]
    index: int | None = None
    of: int | None = None
    base: str
    p: float
    steps: int
    seed: int
    projection: str
    data: dict[str, Any]
    training: dict[str, Any]

    @property
    def timesteps(self) -> TimestepRange:
        return TimestepRange(*self.range)

    @property
    def label(self) -> str:
        return f"{self.index}of{self.of}" if self.of else f"{self.range[0]}-{self.range[1]}"


@dataclass(frozen=True, kw_only=True)
class TaskVectorRecord(ExpertRecord):
    """tau_i = theta_i - theta. `expert` is the fingerprint of theta_i; `norms` are L2 norms:
    `total`, `relative` (to the base), and one per top-level block."""

    kind: ClassVar[str] = "task-vector"
    expert: str
    norms: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MergedRecord(DenoiserRecord):
    """theta + sum_i w_i tau_i. `parents` are {path, kind, fingerprint, range} in the order of
    `coefficients`; `coefficients_for` holds others for the tensors that a glob matches, the first
    glob that does. `method` says what became of the tau_i before, and `settings` with which
    settings. `search` is None for given coefficients; `report` is what was measured afterwards."""

    kind: ClassVar[str] = "merged"
    base: str
    parents: list[dict[str, Any]]
    coefficients: list[float]
    method: str
    projection: str
    coefficients_for: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    report: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplesRecord(Record):
    """Images. `protocol` is the card: how, by which model, from which seed they were drawn.

    `prompts` and `classes`, where there are any, hold one entry per image."""

    kind: ClassVar[str] = "samples"
    protocol: dict[str, Any]
    prompts: list[str] | None = None
    classes: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class StatisticsRecord(Record):
    """Mean and covariance of features. `extractor` is {name, sha256}; `resize` the resize mode."""

    kind: ClassVar[str] = "statistics"
    n: int
    extractor: dict[str, Any]
    resize: str
    source: str
    data: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, type[Record]] = {
    kind.kind: kind
    for kind in (
        BaseRecord,
        ExpertRecord,
        TaskVectorRecord,
        MergedRecord,
        SamplesRecord,
        StatisticsRecord,
    )
}

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


def parse_record(text: str, where: str) -> Record:
    """The record that a header's `deme` string holds. Raises ArtifactError naming what is wrong."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: the deme record is not valid JSON ({error})") from error
    found = document.get("kind") if isinstance(document, dict) else document
    if not isinstance(document, dict) or not isinstance(found, str) or found not in KINDS:
        raise ArtifactError(
            f"{where}: unknown kind of artifact {_short(found)}; known: {', '.join(KINDS)}"
        )
    if document.get("version") != VERSION:
        raise ArtifactError(
            f"{where}: record version {document.get('version')!r}, this deme reads {VERSION}; "
            f"update deme or write the file again"
        )
    kind = KINDS[document["kind"]]
    values = {}
    for declared in fields(kind):
        if declared.name in document:
            values[declared.name] = _checked(document[declared.name], declared, where)
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise ArtifactError(f"{where}: the {kind.kind} record lacks {declared.name!r}")
    if "range" in values:
        _require_range(values["range"], values["num_train_timesteps"], where)
    for declared in fields(kind):
        _require_entries(values.get(declared.name), declared, where)
    require_intact(text, where, is_sealed="digest" in document)
    return kind(**values)


def _require_range(span: list[Any], num_train_timesteps: int, where: str) -> None:
    """Check that `span` is [start, stop] within [0, T)."""
    whole = len(span) == 2 and all(type(end) is int for end in span)
    if not (whole and 0 <= span[0] < span[1] <= num_train_timesteps):
        raise ArtifactError(
            f"{where}: 'range' in the record should be [start, stop] within "
            f"0:{num_train_timesteps}, found {span}"
        )


def _checked(value: Any, declared: Any, where: str) -> Any:
    """`value` if its JSON type is the declared one."""
    if not any(_is_a(value, option) for option in declared.type.split(" | ")):
        raise ArtifactError(
            f"{where}: {declared.name!r} in the record should be {declared.type}, "
            f"found {type(value).__name__}"
        )
    return value


def _require_entries(value: Any, declared: Any, where: str) -> None:
    """Check the entries of a list against the declared ones, as in `list[int]`."""
    entry = declared.type.partition("list[")[2].split(" | ")[0].removesuffix("]")
    if isinstance(value, list) and not all(_is_a(one, entry) for one in value):
        raise ArtifactError(
            f"{where}: {declared.name!r} in the record should be {declared.type}, "
            f"found other entries"
        )


def _is_a(value: Any, declared: str) -> bool:
    """Whether a JSON value has a declared type, of which the part before `[` counts."""
    kinds = _JSON_TYPES[declared.split("[")[0]]
    return isinstance(value, kinds) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """A value as a message shows it, on one line of bounded length."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
