"""The Fréchet distance between two Gaussians, and the running mean and covariance it is taken on.

d features, n images. Everything is float64: the distance is a small difference of large sums.

    |mu_1 - mu_2|^2 + Tr S_1 + Tr S_2 - 2 Tr (S_1 S_2)^(1/2)          (Dowson & Landau 1982)

With S_1 = L L^T the eigenvalues of S_1 S_2 are those of the symmetric L^T S_2 L, so that the last
trace is a sum of square roots of real numbers: no matrix root, no complex part, no added offset.
Where a covariance is singular (n <= d), L comes from a Cholesky decomposition with pivots, which
tells the rank, and the matrix has the size of the smaller rank.
"""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy  # its `linalg` is loaded when asked for
from threadpoolctl import ThreadpoolController

from deme_cli.errors import ArtifactError, ConfigError, NumericsError

_INDEFINITE = 1e-4  # largest remainder of the factorisation, as a share of the largest variance
TRIAL_SIZE = 384  # of the problem that threads are tried on: about 10 ms on one core
_CLEARLY_WORSE = 1.3
_pools = cache(ThreadpoolController)  # looking for them takes longer than a small problem


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of the features of n images (0 if nobody noted n)."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int


@dataclass
class RunningStatistics:
    """Mean and covariance of features that come in batches.

    The sum of squares is kept about the running mean (Chan et al. 1983), so nothing cancels.
    """

    n: int = 0
    _mean: Any = 0.0  # (d,) once there are features
    _scatter: Any = 0.0  # (d, d)

    def add(self, features: np.ndarray) -> None:
        """Take in features (B, d). Raises NumericsError if they are not finite."""
        features = np.asarray(features, dtype=np.float64)
        if not np.isfinite(features).all():
            raise NumericsError("the features are not finite; the images or the extractor are bad")
        n, total = len(features), self.n + len(features)
        if n:
            mean = features.mean(axis=0)
            centred, shift = features - mean, mean - self._mean
            self._scatter += centred.T @ centred
            self._scatter += np.outer(shift, shift * (self.n * n / total))
            self._mean = self._mean + shift * (n / total)
            self.n = total

    def statistics(self, source: str = "") -> Statistics:
        """The mean and the unbiased covariance. source: of the images, for the message.

        Raises ConfigError for fewer than two images.
        """
        if self.n < 2:
            where = f"{source}: " if source else ""
            raise ConfigError(f"{where}a covariance needs at least 2 images, there are {self.n}")
        return Statistics(self._mean.copy(), self._scatter / (self.n - 1), self.n)


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """The squared Fréchet distance between N(mu1, sigma1) and N(mu2, sigma2).

    mu: (d,)   sigma: (d, d), symmetric, may be singular. Raises ArtifactError where the sizes
    disagree, NumericsError on numbers that are not finite or no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (
        np.asarray(part, dtype=np.float64) for part in (mu1, sigma1, mu2, sigma2)
    )
    if not len(mu1) == len(mu2) == len(sigma1) == len(sigma2):
        raise ArtifactError(
            f"statistics of {mu1.size} and of {mu2.size} features cannot be compared; "
            f"make both with the same --features"
        )
    for part in (mu1, sigma1, mu2, sigma2):
        if not np.isfinite(part).all():
            raise NumericsError("a mean or covariance of features is not finite")
    shift = mu1 - mu2
    distance = shift @ shift + np.trace(sigma1) + np.trace(sigma2)
    return max(float(distance - 2 * trace_of_root(sigma1, sigma2)), 0.0)


def trace_of_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """Tr (S_1 S_2)^(1/2) of two covariances (d, d)."""
    with fitting_threads(len(sigma1)):
        eigenvalues = _eigenvalues_regular(sigma1, sigma2)
        if eigenvalues is None:
            eigenvalues = _eigenvalues_singular(sigma1, sigma2)
    return float(np.sqrt(eigenvalues.clip(min=0)).sum())


def _eigenvalues_regular(sigma1: np.ndarray, sigma2: np.ndarray) -> np.ndarray | None:
    """Eigenvalues of L^T S_2 L, S_1 = L L^T; None unless both have full rank up to rounding.

    An eigenvalue of 0 comes out as rounding noise of either sign, and noise is what a square root
    makes large: a single one that is not positive sends both to the other way. LAPACK is called as
    it likes it best: upper halves in Fortran order, which is what the transposes are.
    """
    factor, failed = scipy.linalg.lapack.dpotrf(sigma1.T, lower=0)  # L^T
    tiny = len(sigma1) * np.finfo(np.float64).eps * np.diagonal(sigma1).max(initial=0)
    if failed or (np.diagonal(factor) ** 2).min(initial=np.inf) <= tiny:
        return None
    # L^T S_2 L, its upper half
    inner, _ = scipy.linalg.lapack.dsygst(sigma2.T, factor, itype=3, lower=0)
    eigenvalues = scipy.linalg.eigvalsh(
        inner, lower=False, driver="ev", overwrite_a=True, check_finite=False
    )
    return eigenvalues if eigenvalues[0] > 0 else None


def _eigenvalues_singular(sigma1: np.ndarray, sigma2: np.ndarray) -> np.ndarray:
    """The same from pivoted factors (d, r), by the one of smaller rank: its matrix has no zeros."""
    factor, sigma = _factor(sigma1), sigma2
    if (other := _factor(sigma2)).shape[1] < factor.shape[1]:
        factor, sigma = other, sigma1
    return scipy.linalg.eigvalsh(factor.T @ sigma @ factor) if factor.size else np.zeros(0)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """L (d, r) with L L^T = S, r the rank of S up to rounding.

    Raises NumericsError if S is not positive semi-definite.
    """
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])
    if rank < len(sigma):
        remainder = np.abs(sigma - factor @ factor.T).max()
        if remainder > _INDEFINITE * np.abs(np.diagonal(sigma)).max():
            raise NumericsError("a covariance of features is not positive semi-definite")
    return factor


@contextmanager
def fitting_threads(size: int) -> Iterator[None]:
    """While entered, linear algebra on (size, size) takes one thread unless more pay off.

    The threads of OpenBLAS wait for each other by spinning. Where other processes want the same
    cores, or a container may use fewer cores than it sees, all threads together were measured to be
    up to thirty times slower than one; on an idle machine they are faster. So a small problem is
    tried first.
    """
    pools = _pools()
    if size > TRIAL_SIZE and not _all_are_worse(pools):
        yield
        return
    with pools.limit(limits=1, user_api="blas"):
        yield


def _all_are_worse(pools: ThreadpoolController) -> bool:
    """Whether all threads take clearly longer than one for a small problem."""
    if all(pool["num_threads"] == 1 for pool in pools.info() if pool["user_api"] == "blas"):
        return False
    matrix = np.random.default_rng(0).standard_normal((TRIAL_SIZE, TRIAL_SIZE))

    def seconds() -> float:
        return min(
            timeit.repeat(lambda: scipy.linalg.eigvalsh(matrix, driver="ev"), number=1, repeat=2)
        )

    with pools.limit(limits=1, user_api="blas"):
        one = seconds()  # of two, for the first one pays for waking up
    return seconds() > _CLEARLY_WORSE * one
