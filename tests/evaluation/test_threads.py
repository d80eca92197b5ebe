"""Threads for linear algebra: one for small problems, and as many as before afterwards."""

from __future__ import annotations

from threadpoolctl import threadpool_info

from deme_cli.evaluation.threads import TRIAL_SIZE, fitting_threads


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_small_problems_take_one_thread_and_give_the_others_back() -> None:
    before = blas_threads()
    with fitting_threads(TRIAL_SIZE):
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


def test_large_problems_take_one_thread_or_all() -> None:
    before = blas_threads()
    with fitting_threads(4 * TRIAL_SIZE):
        assert blas_threads() in (before, [1] * len(before))
    assert blas_threads() == before
