"""What the sums over task vectors say: how far experts moved, and where they disagree.

Per tensor the norm |tau|, relative to |theta|. Per pair of experts, over the whole network or a
block, the cosine, and two shares of sign conflict, both 1/2 for vectors that have nothing to do
with each other: of the elements that both moved, those with opposite signs; of min(|tau_i|,
|tau_j|), the part with opposite signs, which their sum loses of each.
T tensors, N experts in the order of their ranges, B blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deme_cli.analysis.task_vectors.effective_rank import effective_rank, full_rank
from deme_cli.analysis.task_vectors.measure import TaskVectors
from deme_cli.merging.coefficients import network_order
from deme_cli.merging.lineage import is_projection
from deme_cli.merging.task_vectors import block_of

UNRELATED = 0.5  # sign conflict of vectors that have nothing to do with each other
_OUTSIDE = ("channel_projection", "other")  # not blocks of the network: shown last
_FENCE = 1.5  # quartile distances to where outliers begin (Tukey 1977)


@dataclass(frozen=True)
class Pairs:
    """Of every two experts, (N, N): cosine, and the two shares of sign conflict; nan is unknown."""

    cosines: np.ndarray
    opposed: np.ndarray
    cancelled: np.ndarray


def known_pairs(values: np.ndarray) -> np.ndarray:
    """What is known of the N (N - 1) / 2 pairs, (N, N) as `Pairs` holds it."""
    own = values[np.tril_indices(len(values), -1)]
    return own[np.isfinite(own)]


def mean_of_pairs(values: np.ndarray) -> float:
    """Over the pairs for which it is known; nan without such."""
    known = known_pairs(values)
    return float(known.mean()) if len(known) else math.nan


def sizes(found: TaskVectors) -> np.ndarray:
    """Numbers of elements (T,)."""
    return np.array([spec.num_elements for spec in found.specs])


def norms(found: TaskVectors) -> np.ndarray:
    """|tau| of every tensor and expert (T, N)."""
    return np.sqrt(np.diagonal(found.pairwise["products"], axis1=1, axis2=2))


def relative_norms(found: TaskVectors) -> np.ndarray:
    """|tau| / |theta| of every tensor and expert (T, N); nan where theta is 0."""
    return _ratio(norms(found), np.sqrt(found.once["squares"])[:, None])


def whole_norms(found: TaskVectors) -> tuple[np.ndarray, np.ndarray]:
    """|tau| (N,) of all tensors, and relative to the base, as `deme task-vector` has it."""
    own = np.array([not is_projection(spec.name) for spec in found.specs])
    total = np.sqrt((norms(found) ** 2).sum(axis=0))
    return total, _ratio(total, np.sqrt(found.once["squares"][own].sum()))


def pairs(found: TaskVectors, chosen: np.ndarray | slice = slice(None)) -> Pairs:
    """Over the chosen tensors together; all of them unless told."""
    sums = {name: values[chosen].sum(axis=0) for name, values in found.pairwise.items()}
    lengths = np.sqrt(np.diag(sums["products"]))
    cosines = _ratio(sums["products"], np.outer(lengths, lengths))
    return Pairs(
        np.clip(cosines, -1, 1),
        _ratio(sums["opposed"], sums["both"]),
        _ratio(sums["cancelled"], sums["overlap"]),
    )


def by_block(found: TaskVectors) -> dict[str, np.ndarray]:
    """Numbers of the tensors of each block, in the network's order."""
    blocks: dict[str, list[int]] = {}
    for index, spec in enumerate(found.specs):
        blocks.setdefault(block_of(spec.name), []).append(index)
    order = sorted(blocks, key=lambda name: (name in _OUTSIDE, network_order(name)))
    return {name: np.array(blocks[name]) for name in order}


def most_opposed(found: TaskVectors) -> tuple[str, float] | None:
    """The block whose pairs have the most elements with opposite signs, and how many on average.

    None without pairs.
    """
    blocks = by_block(found).items()
    means = [(name, mean_of_pairs(pairs(found, tensors).opposed)) for name, tensors in blocks]
    known = [(name, mean) for name, mean in means if math.isfinite(mean)]
    return max(known, key=lambda one: one[1], default=None)


def halves(found: TaskVectors) -> tuple[float, float]:
    """Mean relative norm of the experts within [0, T/2), and of those within [T/2, T).

    (The paper's figure 6(b): slight in the first, notable in the second.) nan without such.
    """
    middle = found.family.base_record.num_train_timesteps / 2
    _, relative = whole_norms(found)
    spans = [parent.record.timesteps for parent in found.family.parents]
    low = [r for r, span in zip(relative, spans, strict=True) if span.stop <= middle]
    high = [r for r, span in zip(relative, spans, strict=True) if span.start >= middle]
    means = [float(np.mean(some)) if some else math.nan for some in (low, high)]
    return means[0], means[1]


def directions(cosines: np.ndarray) -> float:
    """How many independent directions task vectors span: N if all are orthogonal, 1 on one line.

    The effective rank of the matrix of their unit vectors; zero vectors have none.
    cosines: (N, N)
    """
    moved = np.isfinite(np.diag(cosines))
    if not moved.any():
        return math.nan
    squares = np.linalg.eigvalsh(cosines[np.ix_(moved, moved)])
    return effective_rank(np.sqrt(np.maximum(squares, 0)))


def same_sign(found: TaskVectors) -> float:
    """Share of the elements that all experts moved which all moved the same way.

    Of vectors that have nothing to do with each other 2^(1 - N) do. (TIES keeps these whole.)
    """
    return float(_ratio(found.once["unanimous"].sum(), found.once["moved"].sum()))


def unmoved(found: TaskVectors) -> np.ndarray:
    """Share of elements that are those of the base, (N,)."""
    moved = np.diagonal(found.pairwise["both"], axis1=1, axis2=2).sum(axis=0)
    return 1 - moved / sizes(found).sum()


def medians(values: np.ndarray) -> np.ndarray:
    """Of each column, over the rows where it is known; nan without such."""
    known = [column[np.isfinite(column)] for column in values.T]
    return np.array([np.median(column) if len(column) else np.nan for column in known])


def relative_ranks(found: TaskVectors) -> np.ndarray | None:
    """Effective rank / min(out, rest) of theta and the tau_i, (T, 1 + N); nan where none is.

    None where they were not measured.
    """
    if found.effective is None:
        return None
    return found.effective / np.array([full_rank(spec.shape) for spec in found.specs])[:, None]


def median_ranks(found: TaskVectors) -> list[float | None]:
    """Effective rank over full rank, of the base and each expert: medians over the matrices."""
    ranks = relative_ranks(found)
    return [None] * (1 + len(found.names)) if ranks is None else medians(ranks).tolist()


def fences(values: np.ndarray) -> tuple[float, float]:
    """Below and above which relative norms are outliers, judged by their logarithms."""
    first, third = np.quantile(np.log(values), [0.25, 0.75])
    reach = _FENCE * (third - first)
    return math.exp(first - reach), math.exp(third + reach)


def outliers(found: TaskVectors) -> list[dict[str, Any]]:
    """Tensors that an expert moved far more or less than its others, the farthest first."""
    listed = []
    for name, column in zip(found.names, relative_norms(found).T, strict=True):
        known = column[np.isfinite(column) & (column > 0)]
        if not len(known):
            continue
        low, high = fences(known)
        middle = float(np.median(known))
        for spec, value in zip(found.specs, column, strict=True):
            if value > high or 0 < value < low:
                row = {"expert": name, "tensor": spec.name}
                listed.append({**row, "relative": float(value), "of_median": value / middle})
    return sorted(listed, key=lambda row: -abs(math.log(row["of_median"])))


def _ratio(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    """a / b; nan where b is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(b, 0), np.nan, np.divide(a, b))
