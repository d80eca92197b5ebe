"""How alike the gradients of timesteps are: what `deme analyze gradients` writes.

Timesteps are taken in buckets, adjacent ranges of times that cover [0, T). The affinity of two is
the cosine of their mean gradients of the denoising loss (Go et al. 2023, ANT, section 3.1). Noise
in the means draws cosines to 0, so each bucket has its reliability beside it: the cosine between
the means of two halves of its own draws.
n buckets. Needs no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.errors import ArtifactError, ConfigError, MissingError, reading
from deme_cli.timesteps import TimestepRange, parse_span, require_cover

KIND, SCHEMA_VERSION = "gradients", 1
COMMAND = "deme analyze gradients MODEL --data DATA"


@dataclass(frozen=True)
class Affinity:
    """Cosines between the mean gradients of buckets, and what belongs to them: `gradients.json`.

    cosines: (n, n)   losses, norms, reliability: (n,)   model, data: source and fingerprint.
    The cosines were taken from sketches of `sketch_size` numbers, which stand for `parameters`;
    their standard error is at most `standard_error`, 0 where nothing was hashed. `ranges` are the
    clusters of buckets that were suggested for as many experts.
    """

    buckets: list[TimestepRange]
    cosines: list[list[float]]
    norms: list[float]
    losses: list[float]
    reliability: list[float]
    model: dict[str, str]
    data: dict[str, str]
    num: int
    seed: int
    parameters: int
    sketch_size: int
    standard_error: float
    ranges: list[TimestepRange]

    @property
    def whole(self) -> TimestepRange:
        """[0, T)."""
        return TimestepRange(0, self.buckets[-1].stop)

    def to_json(self, **said: Any) -> str:
        """The text of `gradients.json`, one line per bucket's cosines; `said` is for people."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "model": self.model,
            "data": self.data,
            "num_train_timesteps": self.buckets[-1].stop,
            "num": self.num,
            "seed": self.seed,
            "sketch": {
                "size": self.sketch_size,
                "parameters": self.parameters,
                "standard_error": self.standard_error,
            },
            **said,
            "ranges": [str(span) for span in self.ranges],
            "buckets": [str(bucket) for bucket in self.buckets],
            "losses": self.losses,
            "norms": self.norms,
            "reliability": self.reliability,
            "cosines": self.cosines,
        }
        lines = ",\n".join(f"  {json.dumps(key)}: {_lines(document[key])}" for key in document)
        return f"{{\n{lines}\n}}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


def read_affinity(path: Path, fingerprint: str, *, command: str = COMMAND) -> Affinity:
    """The affinity in a file, which must have been measured on the model of this fingerprint.

    command: the one that writes it. Raises MissingError if there is no such file, ArtifactError if
    it is not one or was measured on other weights.
    """
    affinity = _parsed(_read(path, command), path)
    if affinity.model["fingerprint"] != fingerprint:
        raise ArtifactError(
            f"{path}: measured on another model, {affinity.model['source']} "
            f"({affinity.model['fingerprint'][:12]}), not on these weights ({fingerprint[:12]}); "
            f"measure anew with `{command} --force`"
        )
    return affinity


def require_affinity(path: Path, *, command: str = COMMAND) -> None:
    """Check that the file is there; raises MissingError naming the command that writes it."""
    if not path.is_file():
        raise MissingError(f"{path}: no gradients were measured; do so with `{command}`")


def _read(path: Path, command: str) -> dict[str, Any]:
    require_affinity(path, command=command)
    try:
        with reading(path):
            document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not valid JSON ({error}); measure anew with `{command} --force`"
        ) from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ArtifactError(f"{path}: not written by `deme analyze gradients`")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version {document.get('schema_version')!r}, this deme reads "
            f"{SCHEMA_VERSION}; update deme or measure anew with `{command} --force`"
        )
    return document


def _parsed(document: dict[str, Any], path: Path) -> Affinity:
    try:
        affinity = Affinity(
            buckets=[parse_span(text, "bucket") for text in document["buckets"]],
            cosines=[_numbers(row) for row in document["cosines"]],
            norms=_numbers(document["norms"]),
            losses=_numbers(document["losses"]),
            reliability=_numbers(document["reliability"]),
            model={key: str(document["model"][key]) for key in ("source", "fingerprint")},
            data={key: str(document["data"][key]) for key in ("source", "fingerprint")},
            num=int(document["num"]),
            seed=int(document["seed"]),
            parameters=int(document["sketch"]["parameters"]),
            sketch_size=int(document["sketch"]["size"]),
            standard_error=float(document["sketch"]["standard_error"]),
            ranges=[parse_span(text, "range") for text in document["ranges"]],
        )
        require_cover(affinity.buckets, int(document["num_train_timesteps"]))
    except (KeyError, TypeError, ValueError, ConfigError, ArtifactError) as error:
        raise ArtifactError(f"{path}: damaged: {_reason(error)}; measure anew") from error
    n = len(affinity.buckets)
    rows = [affinity.norms, affinity.losses, affinity.reliability, *affinity.cosines]
    if len(affinity.cosines) != n or any(len(row) != n for row in rows):
        raise ArtifactError(f"{path}: damaged: its tables do not fit its {n} buckets")
    if affinity.buckets != sorted(affinity.buckets):
        raise ArtifactError(f"{path}: damaged: its buckets are not in order")
    return affinity


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)


def _numbers(values: list[Any]) -> list[float]:
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers
