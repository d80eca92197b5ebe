"""How many threads a large eigenvalue problem should take on this machine, at this moment.

The threads of OpenBLAS wait for each other by spinning. Where other processes want the same cores,
or a container may use fewer cores than it sees, all threads together were measured to be up to
thirty times slower than one; on an idle machine they are faster. So a small problem is tried first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from scipy.linalg import eigvalsh
from threadpoolctl import ThreadpoolController

TRIAL_SIZE = 384  # about 10 ms on one core
_CLEARLY_WORSE = 1.3


@contextmanager
def fitting_threads(size: int) -> Iterator[None]:
    """While entered, linear algebra on (size, size) takes one thread unless more pay off."""
    pools = _pools()
    if size > TRIAL_SIZE and not _all_are_worse(pools):
        yield
        return
    with pools.limit(limits=1, user_api="blas"):
        yield


@cache
def _pools() -> ThreadpoolController:
    """The thread pools of this process; looking for them takes longer than a small problem."""
    return ThreadpoolController()


def _all_are_worse(pools: ThreadpoolController) -> bool:
    """Whether all threads take clearly longer than one for a small problem."""
    if all(pool["num_threads"] == 1 for pool in pools.info() if pool["user_api"] == "blas"):
        return False
    matrix = np.random.default_rng(0).standard_normal((TRIAL_SIZE, TRIAL_SIZE))
    with pools.limit(limits=1, user_api="blas"):
        _seconds(matrix)  # the first one pays for waking up
        one = _seconds(matrix)
    return _seconds(matrix) > _CLEARLY_WORSE * one


def _seconds(matrix: np.ndarray) -> float:
    began = time.perf_counter()
    eigvalsh(matrix, driver="ev", check_finite=False)
    return time.perf_counter() - began
