"""What each expert changed, and where experts pull against each other (the paper's figure 6(b)).

One pass over the files: per tensor the inner products of the tau_i = theta_i - theta, and of each
pair of experts how many elements, and how much of what both moved, go in opposite directions; then
per matrix its effective rank (effective_rank.py). No network, no data, no torch. A projection that
the base lacks is the identity there, its vector W_i - I.
T tensors in the network's order, N experts in the order of their ranges, n elements of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deme_cli.analysis.task_vectors.effective_rank import (
    effective_rank,
    full_rank,
    gram,
    singular_values,
    stable_rank,
)
from deme_cli.analysis.unfinished import Step, Unfinished
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.merging.coefficients import network_order
from deme_cli.merging.differences import Differences, float_runs, float_specs
from deme_cli.merging.lineage import Family, is_projection
from deme_cli.merging.pieces import COMPUTED_IN, PIECE, Run, Sources, plan_runs
from deme_cli.tensor_file import TensorSpec

Check = Callable[[], None]
_WIDE = np.dtype(np.float64)  # what differences are computed and summed in
# Of two experts: tau_i . tau_j, the number of elements that both moved and of those with opposite
# signs, the sum of min(|tau_i|, |tau_j|) and the part of it with opposite signs.
PAIRWISE = ("products", "both", "opposed", "overlap", "cancelled")
# Of a tensor: |theta|^2, the number of elements that all experts moved, and of those with one sign.
ONCE = ("squares", "moved", "unanimous")


@dataclass(frozen=True)
class TaskVectors:
    """The sums over every tensor, from which numbers.py takes what is shown.

    pairwise: (T, N, N) by name of PAIRWISE   once: (T,) by name of ONCE
    effective, stable: (T, 1 + N) ranks, of theta and the tau_i; nan where there is none: of a zero
    or a vector, of theta where it is the identity; None where they were not asked for.
    """

    family: Family
    specs: list[TensorSpec]
    pairwise: dict[str, np.ndarray]
    once: dict[str, np.ndarray]
    effective: np.ndarray | None = None
    stable: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """What the experts are called: their ranges, with their files where ranges repeat."""
        ranges = [str(parent.record.timesteps) for parent in self.family.parents]
        if len(set(ranges)) == len(ranges):
            return ranges
        folders = [parent.path.parent.name for parent in self.family.parents]
        files = [parent.path.stem for parent in self.family.parents]
        places = folders if len(set(folders)) > 1 else files
        return [f"{span} {place}".strip() for span, place in zip(ranges, places, strict=True)]


def layers_of(family: Family) -> list[TensorSpec]:
    """The tensors that are looked at, in the network's order: floating point, not empty.

    Raises ArtifactError on a dtype that cannot be subtracted.
    """
    specs = [spec for spec in float_specs(family) if spec.num_elements]
    for spec in specs:
        if spec.dtype not in COMPUTED_IN:
            raise ArtifactError(
                f"{family.base.path}: {spec.name!r} of {spec.dtype} cannot be subtracted; "
                f"analyze experts in F32, F16 or BF16"
            )
    return sorted(specs, key=lambda spec: network_order(spec.name))


def measure_task_vectors(
    family: Family, output: Path, *, ranks: bool = True, force: bool = False
) -> Generator[Step | TaskVectors]:
    """Measure every tensor; yields a `Step` of parameters after each, and `TaskVectors` last.

    ranks: also effective ranks, whose time grows with the cubes of layer widths. Finished tensors
    are kept beside the output until the caller discards them, and used again unless `force`.
    Raises NumericsError naming a file and a tensor that is not finite, Stopped after a signal.
    """
    family = replace(family, parents=tuple(family.parents[i] for i in family.by_range))
    specs = layers_of(family)
    runs = {run.specs[0].name: run for run in float_runs(family)}
    identity = {
        "base": family.base_record.fingerprint,
        "experts": [parent.record.fingerprint for parent in family.parents],
        "ranks": ranks,
    }
    with Unfinished(output, identity, force=force) as kept, ExitStack() as stack:
        sums = kept.arrays = kept.arrays or _empty(len(specs), len(family.parents), ranks)
        differences = Differences(stack.enter_context(Sources(family.headers)), family)
        known = ~np.isnan(sums["squares"])
        note = f"continuing after {known.sum()} of {len(specs)} tensors" if known.any() else ""
        done = sum(spec.num_elements for spec, one in zip(specs, known, strict=True) if one)
        yield Step(done, note or kept.note)
        for index in np.flatnonzero(~known):
            kept.done = f"{index} of {len(specs)} tensors"
            run = runs[specs[index].name]
            found = _add_up(differences, run, len(family.parents), kept.check)
            _require_finite(family, run, found)
            if ranks and full_rank(specs[index].shape) > 1:
                found |= _measure_ranks(family, specs[index], kept.check)
            for name, value in found.items():
                sums[name][index] = value
            kept.save_now_and_then()
            yield Step(done := done + run.num_elements)
        yield _task_vectors(family, specs, sums)


def _empty(num_tensors: int, count: int, ranks: bool) -> dict[str, np.ndarray]:
    """Places for what is found; squares that are nan mark a tensor still to be measured."""
    arrays: dict[str, np.ndarray] = {n: np.zeros((num_tensors, count, count)) for n in PAIRWISE}
    arrays |= {name: np.full(num_tensors, np.nan) for name in ONCE}
    if ranks:
        arrays |= {n: np.full((num_tensors, 1 + count), np.nan) for n in ("effective", "stable")}
    return arrays


def _task_vectors(
    family: Family, specs: list[TensorSpec], sums: dict[str, np.ndarray]
) -> TaskVectors:
    return TaskVectors(
        family, specs,
        {name: sums[name] for name in PAIRWISE}, {name: sums[name] for name in ONCE},
        sums.get("effective"), sums.get("stable"),
    )  # fmt: skip


def _add_up(differences: Differences, run: Run, count: int, check: Check) -> dict[str, np.ndarray]:
    """The sums over one tensor: (N, N) by name of PAIRWISE, () by name of ONCE."""
    lower = {name: np.zeros((count, count)) for name in PAIRWISE}
    once = {name: np.zeros(()) for name in ONCE}
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in run.spans(PIECE):
            check()
            theta, taus = differences.read(run, start, stop, _WIDE)
            once["squares"] += (theta * theta).sum()
            _add_signs(once, taus)
            sizes = np.abs(taus)
            for i in range(count):
                for j in range(i + 1):
                    _add_pair(lower, (i, j), taus, sizes)
    return {name: np.tril(one) + np.tril(one, -1).T for name, one in lower.items()} | once


def _add_signs(once: dict[str, np.ndarray], taus: np.ndarray) -> None:
    once["moved"] += np.count_nonzero((taus != 0).all(axis=0))
    once["unanimous"] += np.count_nonzero((taus > 0).all(axis=0) | (taus < 0).all(axis=0))


def _add_pair(
    lower: dict[str, np.ndarray], pair: tuple[int, int], taus: np.ndarray, sizes: np.ndarray
) -> None:
    """Add a piece's elements to the sums of experts i and j."""
    i, j = pair
    product = taus[i] * taus[j]
    opposed = product < 0
    smaller = np.minimum(sizes[i], sizes[j])
    lower["products"][pair] += product.sum()
    lower["both"][pair] += np.count_nonzero(product)
    lower["opposed"][pair] += np.count_nonzero(opposed)
    lower["overlap"][pair] += smaller.sum()
    lower["cancelled"][pair] += smaller[opposed].sum()


def _require_finite(family: Family, run: Run, found: dict[str, np.ndarray]) -> None:
    squares = [found["squares"], *np.diag(found["products"])]
    for header, square in zip(family.headers, squares, strict=True):
        if not np.isfinite(square):
            raise NumericsError(f"{header.path}: {run.specs[0].name!r} is not finite")


def _measure_ranks(family: Family, spec: TensorSpec, check: Check) -> dict[str, np.ndarray]:
    """Effective and stable ranks (1 + N,) of theta and the tau_i of one tensor.

    One expert after another, so that no more than one matrix is ever held.
    """
    values = [_singular_values(family, 0, spec, check, of_base=True)]
    values += [
        _singular_values(family, i, spec, check, of_base=False) for i in range(len(family.parents))
    ]
    return {
        "effective": np.array([effective_rank(one) for one in values]),
        "stable": np.array([stable_rank(one) for one in values]),
    }


def _singular_values(
    family: Family, expert: int, spec: TensorSpec, check: Check, *, of_base: bool
) -> np.ndarray:
    """Those of theta or tau (m,); none where theta is the identity that the base lacks."""
    if of_base and is_projection(spec.name):
        return np.zeros(0)
    alone = replace(family, parents=(family.parents[expert],))
    (run,) = plan_runs([spec], alone.headers)
    with Sources(alone.headers) as sources:
        differences = Differences(sources, alone)

        def read(start: int, stop: int) -> np.ndarray:
            theta, taus = differences.read(run, start, stop, _WIDE)
            return theta if of_base else taus[0]

        return singular_values(gram(read, spec.shape, check))
