"""Places of a landscape shared by several processes of this machine, started for it.

Every place is measured by one process, batch by batch on the same draws, so its numbers do not
depend on how many processes there are. Each holds what subspace.py says.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Event

import numpy as np
import torch

from deme_cli.analysis.landscape.field import Crew, Field, Measured, Place, Setup
from deme_cli.errors import MissingError
from deme_cli.training.held_out import Check

_POLL_SECONDS = 0.2  # between two looks for signals


@contextmanager
def open_workers(setup: Setup, check: Check) -> Iterator[Crew]:
    """A `Crew` of `setup.config.jobs` processes, which start when they are first needed."""
    jobs, context = setup.config.jobs, multiprocessing.get_context("spawn")
    threads, leaving = max(1, torch.get_num_threads() // jobs), context.Event()
    pool = ProcessPoolExecutor(jobs, context, _start, (setup, threads, leaving))
    try:
        yield partial(_share, pool, jobs, check)
    finally:
        leaving.set()
        pool.shutdown(cancel_futures=True)


def _share(pool: ProcessPoolExecutor, jobs: int, check: Check, places: Sequence[Place]) -> Measured:
    """Measure the places; raises what `check` raises, MissingError where a process was killed."""
    waiting = list(reversed(list(enumerate(places))))
    running: dict[Future[np.ndarray], int] = {}
    try:
        while waiting or running:
            check()
            while waiting and len(running) < 2 * jobs:  # one is measured, one is ready
                number, place = waiting.pop()
                running[pool.submit(_measure, place)] = number
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        check()  # who sent it the signal may have sent one here
        raise MissingError(
            "a process that measures points was killed (out of memory?); run the same command "
            "again to continue, with fewer --jobs"
        ) from error


# What follows runs in the processes.


class _Stopped(Exception):
    """The one who asked for this point is leaving."""


_field: Field
_leaving: Event


def _start(setup: Setup, threads: int, leaving: Event) -> None:
    """Ctrl-C reaches all processes of a terminal: the one who watches decides, and tells these."""
    global _field, _leaving
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _field, _leaving = Field(setup), leaving


def _leave_with_parent() -> None:
    """End where the one who watches was killed; nobody else would tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check(*progress: int) -> None:
    if _leaving.is_set():
        raise _Stopped


def _measure(place: Place) -> np.ndarray:
    return _field.errors(place, _check)
