"""The tables of `task-vectors.json`: a row per expert, block and tensor, and what pairs share.

Lists are in the order of the experts, which is that of their ranges.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from deme_cli.analysis.task_vectors import numbers
from deme_cli.analysis.task_vectors.measure import TaskVectors
from deme_cli.analysis.task_vectors.numbers import Pairs
from deme_cli.merging.task_vectors import block_of


def tables(found: TaskVectors) -> dict[str, Any]:
    """What the file holds: rows by expert, block and tensor; lists in the order of `experts`."""
    low, high = numbers.halves(found)
    return {
        "relative_norm": {
            "below_half": low, "from_half": high, "ratio": high / low if low else None,
        },
        "experts": _expert_rows(found),
        "pairs": _pairs(found) if len(found.names) > 1 else None,
        "base_relative_rank": numbers.median_ranks(found)[0],
        "blocks": _block_rows(found),
        "outliers": numbers.outliers(found),
        "tensors": _tensor_rows(found),
    }  # fmt: skip


def _expert_rows(found: TaskVectors) -> list[dict[str, Any]]:
    norms, relative = numbers.whole_norms(found)
    medians = numbers.medians(numbers.relative_norms(found))
    rms = norms / math.sqrt(numbers.sizes(found).sum())
    unmoved, ranks = numbers.unmoved(found), numbers.median_ranks(found)[1:]
    return [
        {
            "name": name, "range": str(parent.record.timesteps), "norm": norms[i].item(),
            "relative_norm": relative[i].item(), "median_relative_norm": medians[i].item(),
            "rms": rms[i].item(), "unmoved_share": unmoved[i].item(),
            "median_relative_rank": ranks[i],
        }
        for i, (name, parent) in enumerate(zip(found.names, found.family.parents, strict=True))
    ]  # fmt: skip


def _pairs(found: TaskVectors) -> dict[str, Any]:
    every, count = numbers.pairs(found), len(found.names)
    return {
        "cosines": every.cosines.tolist(),
        "sign_conflicts": every.opposed.tolist(),
        "sign_conflicts_by_magnitude": every.cancelled.tolist(),
        **_means(every),
        "sign_conflict_if_unrelated": numbers.UNRELATED,
        "same_sign_in_all": numbers.same_sign(found),
        "same_sign_in_all_if_unrelated": 2.0 ** (1 - count),
        "directions": numbers.directions(every.cosines),
    }


def _means(pairs: Pairs) -> dict[str, float]:
    return {
        "mean_cosine": numbers.mean_of_pairs(pairs.cosines),
        "mean_sign_conflict": numbers.mean_of_pairs(pairs.opposed),
        "mean_sign_conflict_by_magnitude": numbers.mean_of_pairs(pairs.cancelled),
    }


def _block_rows(found: TaskVectors) -> list[dict[str, Any]]:
    """In the network's order."""
    rows = []
    for name, tensors in numbers.by_block(found).items():
        squares = (numbers.norms(found)[tensors] ** 2).sum(axis=0)
        base = found.once["squares"][tensors].sum()
        pairs = numbers.pairs(found, tensors)
        row = {
            "name": name, "parameters": int(numbers.sizes(found)[tensors].sum()),
            "relative_norms": np.sqrt(squares / base).tolist() if base else None,
        }  # fmt: skip
        if len(found.names) > 1:
            row |= {**_means(pairs), "cosines": pairs.cosines.tolist()}
            row |= {"sign_conflicts": pairs.opposed.tolist()}
        rows.append(row)
    return rows


def _tensor_rows(found: TaskVectors) -> list[dict[str, Any]]:
    """In the network's order; of each expert norm, relative norm, RMS, and ranks."""
    norms, relative = numbers.norms(found), numbers.relative_norms(found)
    rows = []
    for i, spec in enumerate(found.specs):
        row = {
            "name": spec.name, "block": block_of(spec.name), "shape": list(spec.shape),
            "base_norm": math.sqrt(found.once["squares"][i]), "norms": norms[i].tolist(),
            "relative_norms": relative[i].tolist(),
            "rms": (norms[i] / math.sqrt(spec.num_elements)).tolist(),
        }  # fmt: skip
        if found.effective is not None and not np.isnan(found.effective[i]).all():
            for kind in ("effective", "stable"):
                base, *others = getattr(found, kind)[i].tolist()
                row |= {f"base_{kind}_rank": base, f"{kind}_ranks": others}
        rows.append(row)
    return rows
