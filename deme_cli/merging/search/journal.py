"""Trials on disk: an optuna journal beside the output, shared by any number of processes.

Everything that decides what to try next happens under one lock of the journal, so two workers
never take the same trial. A worker holds a lock of its own as long as it lives, which the system
lets go of when it dies: a running trial whose worker is gone is marked as lost, and its point is
free again. A line torn by a kill is cut off before the next one is written. optuna's own tools read
the file.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.errors import ArtifactError, ConfigError, writing
from deme_cli.merging.search.journal_file import (
    STUDY,
    JournalLock,
    difference,
    open_storage,
    read_journal,
)
from deme_cli.merging.search.trials import Asked, Trial, trials_of
from deme_cli.outputs import file_lock, holder_of

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

_LOST, _MERGED = "lost", "merged"


class Journal:
    """The trials of one search in the file `path`; `labels` name the D numbers of a point.

    search: everything the trials depend on, as JSON. Used as a context manager; from `open` until
    it is left this process counts as a worker that lives.
    """

    def __init__(self, path: Path, labels: Sequence[str], search: dict[str, Any]) -> None:
        self.path, self.labels = path, list(labels)
        self.search = json.loads(json.dumps(search))
        self.worker = uuid.uuid4().hex
        self._lock = JournalLock(self.path)
        self._storage: JournalStorage | None = None
        self._study = -1
        self._alive: BaseFileLock | None = None

    def __enter__(self) -> Journal:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._alive is not None:
            self._lock_of(self.worker).unlink(missing_ok=True)
            self._alive.release()
        self._lock.tidy()

    def _lock_of(self, worker: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{worker}.worker")

    def open(self, *, force: bool) -> int:
        """Take over the trials of this search, or begin a new journal; returns how many are done.

        A finished search is repeated only with `force`, which also replaces the journal of another
        one. Raises ConfigError where the journal belongs to another search.
        """
        with writing(self.path), self._lock:
            self._sweep()
            if self.path.exists() and self.path.stat().st_size and force:
                found = self._found()
                if found is None or found[0] != self.search or found[1]:
                    self._require_alone()
                    self.path.write_bytes(b"")
            self._storage = open_storage(self.path, self._lock)
            self._claim_study()
            self._alive = file_lock(self._lock_of(self.worker))
            self._alive.acquire(timeout=0)
        return sum(one.value is not None for one in self.asked())

    def _require_alone(self) -> None:
        """Check that nobody works on the journal that is to be replaced."""
        for place in self.path.parent.glob(f".{escape(self.path.name)}.*.worker"):
            raise ConfigError(
                f"{self.path} is in use by another deme process{holder_of(place)}; wait for it or "
                f"use --output"
            )

    def _found(self) -> tuple[dict[str, Any], bool] | None:
        """The search in the file and whether it is finished; None where nothing can be read."""
        try:
            document = read_journal(self.path, self._lock)
        except (ArtifactError, ConfigError):
            return None
        return document.search, document.merged is not None

    def _claim_study(self) -> None:
        """Find the study, or create it; check that it is of this search."""
        from optuna.study import StudyDirection

        storage = self._opened
        try:
            self._study = storage.get_study_id_from_name(STUDY)
        except KeyError:
            self._study = storage.create_new_study([StudyDirection.MINIMIZE], STUDY)
        attributes = storage.get_study_user_attrs(self._study)
        if "search" not in attributes:
            storage.set_study_user_attr(self._study, "labels", self.labels)
            storage.set_study_user_attr(self._study, "search", self.search)
        elif attributes["search"] != self.search:
            raise ConfigError(
                f"{self.path} holds the trials of another search ("
                f"{difference(attributes['search'], self.search)}); add --force to start anew, or "
                f"choose another --output"
            )

    @property
    def _opened(self) -> JournalStorage:
        assert self._storage is not None, "the journal is not open"
        return self._storage

    @contextmanager
    def planning(self) -> Iterator[list[Asked]]:
        """While entered nobody else plans; gives the trials, those of dead workers set free."""
        with writing(self.path), self._lock:
            for trial in self._trials():
                if not trial.state.is_finished() and self._is_dead(trial.user_attrs["worker"]):
                    self._mark_lost(trial._trial_id)
            yield self.asked()

    def _is_dead(self, worker: str) -> bool:
        place = self._lock_of(worker)
        if worker == self.worker:
            return False
        if not place.exists():
            return True
        lock = file_lock(place)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            return False
        lock.release()
        place.unlink(missing_ok=True)
        return True

    def _sweep(self) -> None:
        """Remove the locks of workers that died between two trials. Only under the lock."""
        for place in self.path.parent.glob(f".{escape(self.path.name)}.*.worker"):
            self._is_dead(place.name.split(".")[-2])

    def _mark_lost(self, trial_id: int) -> None:
        from optuna.trial import TrialState

        self._opened.set_trial_user_attr(trial_id, _LOST, True)
        self._opened.set_trial_state_values(trial_id, TrialState.FAIL)

    def start(self, rung: int, point: Sequence[float], name: str = "") -> int:
        """Note that this worker evaluates `point`; returns the trial's id. Only while planning."""
        from optuna.distributions import BaseDistribution, FloatDistribution
        from optuna.trial import TrialState, create_trial

        kinds: dict[str, BaseDistribution] = {
            label: FloatDistribution(min(-1.0, w), max(2.0, w))
            for label, w in zip(self.labels, point, strict=True)
        }
        template = create_trial(
            state=TrialState.RUNNING, params=dict(zip(self.labels, point, strict=True)),
            distributions=kinds, user_attrs={"rung": rung, "name": name, "worker": self.worker},
        )  # fmt: skip
        return self._opened.create_new_trial(self._study, template)

    def finish(self, trial_id: int, value: float, extra: dict[str, Any] | None = None) -> Trial:
        """Note the objective of a trial that this worker has started; not finite: a broken one."""
        from optuna.trial import TrialState

        with writing(self.path), self._lock:
            for key, what in (extra or {}).items():
                self._opened.set_trial_user_attr(trial_id, key, what)
            if math.isfinite(value):
                self._opened.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
            else:
                self._opened.set_trial_state_values(trial_id, TrialState.FAIL)
            number = self._opened.get_trial_number_from_id(trial_id)
        return next(trial for trial in trials_of(self.asked()) if trial.index == number)

    def give_back(self, trial_id: int) -> None:
        """Free the point of a trial that this worker will not finish."""
        with writing(self.path), self._lock:
            self._mark_lost(trial_id)

    def mark_merged(self, fingerprint: str) -> None:
        """Note that the merged file was written: the search is finished."""
        with writing(self.path), self._lock:
            self._opened.set_study_user_attr(self._study, _MERGED, fingerprint)
            self._sweep()

    @property
    def merged(self) -> str | None:
        """The fingerprint of the merged file, once it is written."""
        return self._opened.get_study_user_attrs(self._study).get(_MERGED)

    def _trials(self) -> list[FrozenTrial]:
        return self._opened.get_all_trials(self._study, deepcopy=False)

    def asked(self) -> list[Asked]:
        """All trials that count, in the order in which they were begun; lost ones do not."""
        return asked_trials(self._trials(), self.labels)


def asked_trials(trials: Sequence[FrozenTrial], labels: Sequence[str]) -> list[Asked]:
    """optuna's trials as ours, without the lost ones."""
    found = []
    for trial in trials:
        attributes = trial.user_attrs
        if attributes.get(_LOST):
            continue
        value = trial.values[0] if trial.values else math.inf if trial.state.is_finished() else None
        began, ended = (
            d.timestamp() if d else 0.0 for d in (trial.datetime_start, trial.datetime_complete)
        )
        extra = {k: v for k, v in attributes.items() if k not in ("rung", "name", "worker")}
        point = tuple(trial.params[label] for label in labels)
        found.append(
            Asked(
                trial.number,
                attributes["rung"],
                point,
                value,
                attributes["name"],
                began,
                ended,
                extra,
            )
        )
    return found
