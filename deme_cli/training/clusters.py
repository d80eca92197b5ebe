"""Clusters of timesteps that have something in common: adjacent intervals of least total cost.

(Go et al. 2023, ANT, section 4.2.) k intervals I_1 .. I_k of n items minimise sum_i cost(I_i),
found exactly by dynamic programming. With c = (l + r) // 2, the middle of items l .. r:

    SNR       cost(l, r) = sum_{t=l..r} |v_t - v_c|        v the signal-to-noise ratio or its log
    gradient  cost(l, r) = -sum_{t=l..r} size_t A[c, t]    A the cosines of mean gradients

On the SNR itself, as the paper prints it, the clusters are useless: it falls from 10^4 to 1 within
the first quarter, so that of T = 1000 (DDPM, linear) 4 clusters are 0:1, 1:4, 4:15 and 15:1000. On
its logarithm, which the published implementations measure, they are 0:221, 221:522, 522:779 and
779:1000. Both are offered, as `snr` and `log-snr`.

The affinity of two buckets, adjacent ranges of times, is the cosine of their mean gradients of the
denoising loss (section 3.1); `deme analyze gradients` measures and writes it. Noise in the means
draws cosines to 0, so each bucket has its reliability beside it: the cosine between the means of
two halves of its own draws.
n items or buckets, k clusters, T timesteps. Draws and times are those of diffusion/schedule.py.
No torch where this is imported: an affinity is checked before anything is loaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.config import DIVISIONS
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError, reading
from deme_cli.timesteps import TimestepRange, parse_span, require_cover, split_uniform

if TYPE_CHECKING:
    from deme_cli.diffusion.schedule import Schedule

KIND, SCHEMA_VERSION = "gradients", 1
COMMAND = "deme analyze gradients MODEL --data DATA"


def interval_clusters(cost: np.ndarray, k: int) -> list[tuple[int, int]]:
    """The k adjacent half-open intervals of n items with the least total cost.

    cost: (n, n), entry [l, r] for the items l .. r; only l <= r is read. Of equal totals the one
    whose last intervals are longest is taken. Raises ConfigError unless 1 <= k <= n.
    """
    n = len(cost)
    if not 1 <= k <= n:
        raise ConfigError(f"cannot form {k} clusters of {n} items; choose from 1 to {n}")
    cost = np.where(np.tri(n, dtype=bool).T, cost, np.inf)
    best, starts = cost[0], []  # of items 0 .. r in j clusters; where the last of them starts
    for _ in range(1, k):
        before = np.concatenate([[np.inf], best[:-1]])
        total = before[:, None] + cost  # of items 0 .. r, the last cluster being l .. r
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    edges = [n]
    for start in reversed(starts):
        edges.append(int(start[edges[-1] - 1]))
    return list(pairwise([0, *reversed(edges)]))


def snr_cost(values: np.ndarray) -> np.ndarray:
    """sum_{t=l..r} |v_t - v_c| for values (n,):  (n, n), zero where l > r."""
    return _sums_around_the_middle(np.abs(values[None, :] - values[:, None]))


def affinity_cost(affinity: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """-sum_{t=l..r} size_t A[c, t] for A (n, n), sizes (n,):  (n, n), zero where l > r."""
    return _sums_around_the_middle(-affinity * sizes)


def _sums_around_the_middle(terms: np.ndarray) -> np.ndarray:
    """sum_{t=l..r} terms[c, t]: (n, n) -> (n, n). Summed from c outwards: nothing cancels."""
    n = len(terms)
    sums = np.zeros((n, n))
    for c in range(n):
        right = np.cumsum(terms[c, c:])  # of c .. c + d
        left = np.concatenate([[0.0], np.cumsum(terms[c, :c][::-1])])  # of c - d .. c - 1
        d = np.arange(min(len(left), len(right)))
        sums[c - d, c + d] = left[d] + right[d]
        d = d[: len(right) - 1]
        sums[c - d, c + d + 1] = left[d] + right[d + 1]
    return sums


def cluster_draws(
    span: TimestepRange, k: int, by: str, schedule: Schedule, affinity: Affinity | None = None
) -> list[TimestepRange]:
    """k adjacent clusters of the draws in `span` that cover it once.

    by: `uniform` (equal parts), `snr`, `log-snr`, or `gradient`, whose clusters end where buckets
    of the `affinity` do. Raises ConfigError where `span` has fewer than k draws or buckets,
    ArtifactError where the affinity is of other timesteps.
    """
    assert by in DIVISIONS, by
    if k > len(span):
        raise ConfigError(f"cannot form {k} clusters of the {len(span)} timesteps in {span}")
    if by == "uniform":
        clusters = [(part.start, part.stop) for part in split_uniform(k, len(span))]
    elif by == "gradient":
        assert affinity is not None
        return _by_gradient(span, k, schedule, affinity)
    else:
        values = _finite(schedule.snr.numpy(), in_log=by == "log-snr")
        clusters = interval_clusters(snr_cost(values[span.start : span.stop]), k)
    return [TimestepRange(span.start + start, span.start + stop) for start, stop in clusters]


def split_times(
    k: int, by: str, schedule: Schedule, affinity: Affinity | None = None
) -> list[TimestepRange]:
    """k adjacent ranges of times that cover [0, T) once; see `cluster_draws`.

    Where two draws of a flow schedule share a whole time, both go to the later range. Raises
    ConfigError also where whole times cannot tell two clusters apart.
    """
    import torch

    total = schedule.num_train_timesteps
    if by == "uniform":
        return split_uniform(k, total)
    clusters = cluster_draws(TimestepRange(0, total), k, by, schedule, affinity)
    times = schedule.times(torch.arange(total)).floor().long().tolist()
    edges = [0, *(times[cluster.start] for cluster in clusters[1:]), total]
    for cluster, (start, stop) in zip(clusters, pairwise(edges), strict=True):
        if start >= stop:
            raise ConfigError(
                f"cannot divide by {by} into {k} ranges: draws {cluster} of this schedule lie "
                f"within one timestep; choose a smaller -n"
            )
    return [TimestepRange(start, stop) for start, stop in pairwise(edges)]


def _finite(snr: np.ndarray, *, in_log: bool) -> np.ndarray:
    """The ratios or their logarithms; what is infinite takes the value of its neighbour."""
    with np.errstate(divide="ignore"):
        values = np.log(snr) if in_log else snr
    place, known = np.arange(len(values)), np.isfinite(values)
    return np.interp(place, place[known], values[known])


def _by_gradient(
    span: TimestepRange, k: int, schedule: Schedule, affinity: Affinity
) -> list[TimestepRange]:
    """Clusters of the affinity's buckets, as far as they lie in `span`."""
    total, known = schedule.num_train_timesteps, affinity.buckets[-1].stop
    if known != total:
        raise ArtifactError(
            f"the gradients were measured on {known} timesteps, this model has {total}; measure "
            f"them anew with `deme analyze gradients`"
        )
    draws = [schedule.indices(bucket) for bucket in affinity.buckets]
    chosen = [i for i, one in enumerate(draws) if one.start < span.stop and span.start < one.stop]
    edges = [*(max(draws[i].start, span.start) for i in chosen), span.stop]
    if k > len(chosen):
        raise ConfigError(
            f"cannot form {k} clusters of the {len(chosen)} buckets of gradients in {span}; "
            f"measure more with `deme analyze gradients --buckets`"
        )
    cosines = np.array(affinity.cosines)[np.ix_(chosen, chosen)]
    clusters = interval_clusters(affinity_cost(cosines, np.diff(edges)), k)
    return [TimestepRange(edges[start], edges[stop]) for start, stop in clusters]


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
        sketch = {"size": self.sketch_size, "parameters": self.parameters}
        document = {
            "schema_version": SCHEMA_VERSION, "kind": KIND, "model": self.model, "data": self.data,
            "num_train_timesteps": self.whole.stop, "num": self.num, "seed": self.seed,
            "sketch": {**sketch, "standard_error": self.standard_error}, **said,
            "ranges": list(map(str, self.ranges)), "buckets": list(map(str, self.buckets)),
            "losses": self.losses, "norms": self.norms, "reliability": self.reliability,
        }  # fmt: skip
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.cosines)
        return "{\n" + ",\n".join([*lines, f'  "cosines": [\n{rows}\n  ]']) + "\n}\n"


def read_affinity(path: Path, fingerprint: str | None, *, command: str = COMMAND) -> Affinity:
    """The affinity in a file, which must have been measured on the model of this fingerprint, if
    that is known.

    command: the one that writes it. Raises MissingError if there is no such file, ArtifactError if
    it is not one or was measured on other weights.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no gradients were measured; do so with `{command}`")
    with reading(path):
        text = path.read_bytes()
    try:
        found = json.loads(text)
        if (found["kind"], found["schema_version"]) != (KIND, SCHEMA_VERSION):
            raise ValueError(f"expected kind {KIND!r} and schema_version {SCHEMA_VERSION}")
        model, data = (
            {name: str(found[one][name]) for name in ("source", "fingerprint")}
            for one in ("model", "data")
        )
        affinity = Affinity(
            buckets=[parse_span(text, "bucket") for text in found["buckets"]],
            cosines=[_numbers(row) for row in found["cosines"]],
            norms=_numbers(found["norms"]), losses=_numbers(found["losses"]),
            reliability=_numbers(found["reliability"]), model=model, data=data,
            num=int(found["num"]), seed=int(found["seed"]),
            parameters=int(found["sketch"]["parameters"]),
            sketch_size=int(found["sketch"]["size"]),
            standard_error=float(found["sketch"]["standard_error"]),
            ranges=[parse_span(text, "range") for text in found["ranges"]],
        )  # fmt: skip
        require_cover(affinity.buckets, int(found["num_train_timesteps"]))
        n = len(affinity.buckets)
        rows = [affinity.norms, affinity.losses, affinity.reliability, *affinity.cosines]
        is_whole = len(affinity.cosines) == n and all(len(row) == n for row in rows)
        if not is_whole or affinity.buckets != sorted(affinity.buckets):
            raise ValueError(f"expected {n} buckets in order and as many numbers of each")
    except (LookupError, TypeError, ValueError, RecursionError, DemeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ArtifactError(
            f"{path}: no gradients that this deme can read: {reason}; measure anew with "
            f"`{command} --force`"
        ) from error
    if fingerprint is not None and affinity.model["fingerprint"] != fingerprint:
        raise ArtifactError(
            f"{path}: measured on another model, {affinity.model['source']} "
            f"({affinity.model['fingerprint'][:12]}), not on these weights ({fingerprint[:12]}); "
            f"measure anew with `{command} --force`"
        )
    return affinity


def _numbers(values: list[Any]) -> list[float]:
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers
