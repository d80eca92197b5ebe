"""The Fréchet distance at d = 2048: deme and clean-fid side by side, in interleaved rounds.

    python examples/benchmarks/bench_frechet.py [--rounds 5] [--dimension 2048]

Prints the seconds of each round and the median ratio with its range; target: at least 15. Then the
singular case (n < d), where clean-fid's figure is shown beside ours and the exact one, which needs
the features themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from rounds import machine, skip, verdict

from deme_cli.evaluation.frechet import frechet_distance

Gaussian = tuple[np.ndarray, np.ndarray]


def draw_features(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated features whose spectrum falls as that of a network's does."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((d, d)))
    scale = np.exp(-np.arange(d) / (d / 10) / 2)
    return generator.standard_normal((n, d)) * scale @ basis.T


def gaussian_of(features: np.ndarray) -> Gaussian:
    return features.mean(axis=0), np.cov(features, rowvar=False)


def clean_fid_distance(*parts: np.ndarray) -> float:
    """clean-fid's figure; `disp`, which it asks of scipy and scipy 1.18 drops, is served here."""
    import scipy.linalg
    from cleanfid import fid

    def sqrtm(matrix: np.ndarray, disp: bool = True) -> object:
        root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, 0.0)

    fid.linalg = SimpleNamespace(sqrtm=sqrtm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(fid.frechet_distance(*parts))


def timed(function: Callable[..., float], *parts: np.ndarray) -> tuple[float, float]:
    began = time.perf_counter()
    value = function(*parts)
    return time.perf_counter() - began, value


def compare(label: str, parts: tuple[np.ndarray, ...], rounds: int) -> None:
    ratios = []
    for number in range(rounds):
        ours, value = timed(frechet_distance, *parts)
        theirs, other = timed(clean_fid_distance, *parts)
        ratios.append(theirs / ours)
        print(
            f"{label} round {number + 1}: deme {ours:.2f} s, clean-fid {theirs:.2f} s, "
            f"ratio {ratios[-1]:.1f}; distances {value:.9g} and {other:.9g}, "
            f"relative difference {abs(value - other) / abs(other):.1e}",
            flush=True,
        )
    print(verdict(f"{label}: clean-fid / deme", ratios, ">= 15"))


def exact_distance(x: np.ndarray, y: np.ndarray) -> float:
    """From the features: the trace of the root is the nuclear norm of the small matrix X Y^T."""
    x0, y0 = x - x.mean(axis=0), y - y.mean(axis=0)
    root = np.linalg.svd(x0 @ y0.T, compute_uv=False).sum()
    root /= ((len(x) - 1) * (len(y) - 1)) ** 0.5
    shift = x.mean(axis=0) - y.mean(axis=0)
    spread = (x0**2).sum() / (len(x) - 1) + (y0**2).sum() / (len(y) - 1)
    return float(shift @ shift + spread - 2 * root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=2048)
    options = parser.parse_args()
    print(machine())
    if importlib.util.find_spec("cleanfid") is None:
        skip("clean-fid", "not installed; nothing is compared")
        return
    d = options.dimension
    x, y = draw_features(3 * d, d, seed=1), draw_features(3 * d, d, seed=2)
    frechet_distance(*gaussian_of(x[:50, :50]), *gaussian_of(y[:50, :50]))  # load the libraries
    compare(f"d = {d}, n = {3 * d}", (*gaussian_of(x), *gaussian_of(y)), options.rounds)
    few, more = x[: d // 4], y[: d // 2]
    compare(
        f"d = {d}, n = {len(few)} and {len(more)} (singular)",
        (*gaussian_of(few), *gaussian_of(more)),
        1,
    )
    print(f"exact from the features: {exact_distance(few, more):.9g}")


if __name__ == "__main__":
    main()
