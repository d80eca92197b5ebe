"""What task vectors say: in a sentence, at the foot of their picture, and in their file."""

from __future__ import annotations

import math

from deme_cli.analysis.document import document_bytes
from deme_cli.analysis.task_vectors import numbers
from deme_cli.analysis.task_vectors.measure import TaskVectors
from deme_cli.analysis.task_vectors.tables import tables

_CLEAR = 1.1  # ratio of norms from which one is told to be larger


def foot_of(found: TaskVectors, size: int) -> str:
    """How much was measured, how boxes are drawn, and what they leave out or do not name."""
    parts = [
        f"{len(found.specs)} tensors, {size:,} parameters; boxes: quartiles, whiskers to 1.5 "
        f"quartile distances, dots beyond"
    ]
    if listed := numbers.outliers(found):
        row = listed[0]
        moved = f"{row['tensor']} moved {row['relative']:.2g} in {row['expert']}"
        parts.append(f"farthest dot: {moved}")
    if zeros := int((found.once["squares"] == 0).sum()):
        parts.append(f"tensors without relative norm, 0 in the base: {zeros}")
    still = zip(found.names, (numbers.norms(found) == 0).sum(axis=0).tolist(), strict=True)
    if shown := [f"{count} in {name}" for name, count in still if count]:
        parts.append(f"tensors that did not move: {', '.join(shown)}")
    half = (len(parts) + 1) // 2
    return "\n".join("; ".join(some) for some in (parts[:half], parts[half:]) if some)


def document_of(found: TaskVectors) -> bytes:
    """The file: what was measured, and its tables."""
    family = found.family
    protocol = {
        "base": {"source": str(family.base.path), "fingerprint": family.base_record.fingerprint},
        "experts": [
            {
                "source": str(parent.path), "kind": parent.record.kind,
                "fingerprint": parent.record.fingerprint, "range": str(parent.record.timesteps),
                "steps": parent.record.steps, "p": parent.record.p,
                "projection": parent.record.projection,
            }
            for parent in family.parents
        ],
        "num_train_timesteps": family.base_record.num_train_timesteps,
        "ranks": found.effective is not None,
    }  # fmt: skip
    return document_bytes("task-vectors", read_task_vectors(found), protocol, **tables(found))


def read_task_vectors(found: TaskVectors) -> str:
    """In a sentence: how far experts moved, whether more where t is large, and who disagrees."""
    parts = [f"{_moved(found)}{_against_paper(found)}"]
    if len(found.names) > 1:
        parts.append(_disagreement(found))
    base, *ranks = numbers.median_ranks(found)
    known = [rank for rank in ranks if rank is not None and math.isfinite(rank)]
    if base is not None and known:
        low, high = f"{min(known):.2f}", f"{max(known):.2f}"
        span = low if low == high else f"{low} to {high}"
        parts.append(f"effective rank {span} of full (base {base:.2f})")
    return "; ".join(parts)


def _moved(found: TaskVectors) -> str:
    _, relative = numbers.whole_norms(found)
    shares = zip(relative, found.names, strict=True)
    told = ", ".join(f"{100 * one:.2g} % ({name})" for one, name in shares)
    return f"task vectors are {told} of the base's norm"


def _against_paper(found: TaskVectors) -> str:
    """Whether those of large t moved farther, as the paper's figure 6(b) shows."""
    low, high = numbers.halves(found)
    if not (low > 0 and math.isfinite(high)):
        return ""
    middle, ratio = found.family.base_record.num_train_timesteps // 2, high / low
    words = f"about as long above t = {middle} as below"
    if ratio >= _CLEAR:
        words = f"longer above t = {middle} than below, as in the paper"
    elif ratio <= 1 / _CLEAR:
        words = f"shorter above t = {middle} than below, unlike the paper"
    return f", {words} (ratio {ratio:.2f})"


def _disagreement(found: TaskVectors) -> str:
    """Cosine, sign conflict and the block with the most of it; experts without a direction."""
    every, (norms, _) = numbers.pairs(found), numbers.whole_norms(found)
    still = [name for name, norm in zip(found.names, norms, strict=True) if norm == 0]
    told = f"; no cosine where nothing moved ({', '.join(still)})" if still else ""
    worst = numbers.most_opposed(found)
    if worst is None:
        return f"no two experts moved the same elements{told}"
    block, most = worst
    return (
        f"{_cosines(found.names, every.cosines.tolist())}; signs differ in "
        f"{100 * numbers.mean_of_pairs(every.opposed):.0f} % of elements (50 % if unrelated), most "
        f"in {block} ({100 * most:.0f} %); {numbers.directions(every.cosines):.1f} independent "
        f"directions of {len(found.names)}{told}"
    )


def _cosines(names: list[str], cosines: list[list[float]]) -> str:
    """The two pairs that are least and most alike."""
    known = sorted(
        (value, f"{names[j]} and {names[i]}")
        for i, row in enumerate(cosines)
        for j, value in enumerate(row[:i])
        if math.isfinite(value)
    )
    ends = known if len(known) == 1 else [known[0], known[-1]]
    return f"cosine {' to '.join(f'{value:.2f} ({pair})' for value, pair in ends)}"
