"""What the gradients of timesteps say together: near and far, within ranges and across them.

(The paper's figure 1.) n buckets with mean gradients g_i, of which an `Affinity` holds norms and
cosines, and the reliability r_i, the cosine between the means of two halves of a bucket's draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.timesteps import TimestepRange, route, split_uniform
from deme_cli.training.affinity import Affinity

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def pair_cosines(
    affinity: Affinity, ranges: Sequence[TimestepRange]
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of every two buckets in one range, and of every two in two ranges."""
    owners = np.array([route(bucket.start, ranges) for bucket in affinity.buckets])
    i, j = np.tril_indices(len(owners), -1)
    values, are_together = np.array(affinity.cosines)[i, j], owners[i] == owners[j]
    return values[are_together], values[~are_together]


def distance_cosines(affinity: Affinity) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of neighbouring buckets, and of buckets at least T / 2 apart."""
    values, n = np.array(affinity.cosines), len(affinity.buckets)
    i, j = np.triu_indices(n, -(-n // 2))
    return np.diagonal(values, 1), values[i, j]


def mean_norm(affinity: Affinity, span: TimestepRange) -> float:
    """|sum_i w_i g_i| over the buckets of a range, w_i their shares of it, without noise.

    A product of two buckets has no noise on average. In |g_i|^2 it is taken out by what two halves
    of the draws agree in: the signal is n_i^2 2r / (1 + r), n_i the norm of their mean (Spearman
    and Brown 1910). 0 where noise is all there is; compare with `noise_norm`.
    """
    chosen, lengths, signal = _weighted(affinity, span)
    products = np.array(affinity.cosines)[np.ix_(chosen, chosen)]
    np.fill_diagonal(products, signal)
    return float(np.sqrt(max(lengths @ products @ lengths, 0.0)))


def noise_norm(affinity: Affinity, span: TimestepRange) -> float:
    """The norm of the noise in that mean, sqrt(sum_i w_i^2 n_i^2 (1 - r_i) / (1 + r_i))."""
    _, lengths, signal = _weighted(affinity, span)
    return float(np.sqrt((lengths**2 * (1 - signal)).sum()))


def _weighted(affinity: Affinity, span: TimestepRange) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The buckets of a range, their w_i n_i, and the share of signal in each |g_i|^2."""
    chosen = [i for i, bucket in enumerate(affinity.buckets) if bucket.start in span]
    shares = np.array([len(affinity.buckets[i]) for i in chosen], dtype=float)
    r = np.clip(np.array(affinity.reliability)[chosen], 0, 1)
    return chosen, shares / shares.sum() * np.array(affinity.norms)[chosen], 2 * r / (1 + r)


def said_of(affinity: Affinity) -> dict[str, object]:
    """What `gradients.json` tells people, besides what it tells `deme split`."""
    within, across = pair_cosines(affinity, affinity.ranges)
    spans = (affinity.whole, *affinity.ranges)
    return {
        "reading": read_gradients(affinity),
        "protocol": {
            "model": affinity.model,
            "data": {**affinity.data, "split": "train"},
            "buckets": len(affinity.buckets),
            "num": affinity.num,
            "seed": affinity.seed,
            "n": len(affinity.ranges),
        },
        "quantiles": list(QUANTILES),
        "within_ranges": _quantiles(within),
        "across_ranges": _quantiles(across),
        "mean_norms": {str(span): mean_norm(affinity, span) for span in spans},
        "noise_norms": {str(span): noise_norm(affinity, span) for span in spans},
    }


def numbers_of(affinity: Affinity) -> dict[str, float | None]:
    """The means that the reading names; None where there are no such pairs."""
    equal = split_uniform(len(affinity.ranges), affinity.whole.stop)
    groups = {
        ("within", "across"): pair_cosines(affinity, affinity.ranges),
        ("equal_within", "equal_across"): pair_cosines(affinity, equal),
        ("neighbouring", "distant"): distance_cosines(affinity),
    }
    found = {
        name: float(values.mean()) if values.size else None
        for names, pair in groups.items()
        for name, values in zip(names, pair, strict=True)
    }
    return {**found, "reliability_median": float(np.median(affinity.reliability))}


def read_gradients(affinity: Affinity) -> str:
    """In a sentence: near and far timesteps, and what the ranges do about it."""
    shown = {k: "-" if v is None else f"{v:.2f}" for k, v in numbers_of(affinity).items()}
    whole, count = affinity.whole, len(affinity.ranges)
    norm, noise = mean_norm(affinity, whole), noise_norm(affinity, whole)
    largest = max(mean_norm(affinity, span) for span in affinity.ranges)
    return (
        f"mean cosine {shown['neighbouring']} of neighbouring buckets, {shown['distant']} of those "
        f"at least half of {whole} apart; {count} ranges by gradient, "
        f"{', '.join(map(str, affinity.ranges))}: {shown['within']} within, {shown['across']} "
        f"across (equal ranges: {shown['equal_within']}, {shown['equal_across']}); norm of the "
        f"mean gradient {norm:.2g} over all timesteps (noise {noise:.2g}), up to {largest:.2g} "
        f"over a range; two halves of a bucket's draws agree to {shown['reliability_median']} "
        f"(median)"
    )


def _quantiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, QUANTILES).round(6).tolist() if values.size else []
