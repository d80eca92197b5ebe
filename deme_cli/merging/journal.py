"""Trials on disk: an optuna journal beside the output, shared by any number of processes.

optuna keeps the file, one line per operation, and its tools read it; a trial that failed there is
one that was lost. What is ours: one lock around every choice and every line, under which a line
that a killed process left torn is cut off; and a lock that each process holds for as long as it
lives, so that the trials of those that are gone are free again.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deme_cli import console
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError, writing
from deme_cli.jobs import file_lock, holder_of
from deme_cli.merging.coefficients import Point

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

STUDY = "deme-merge"
MERGED = "merged"
_LOCK_SECONDS = 120.0  # waited for the lock, which nobody holds for long
_WAIT_SECONDS = 0.5  # between two looks whether another process has ended
_OPERATION = b'{"op_code"'  # how every line of optuna's begins


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation: a point of the space and its objective, infinite where it was not finite or
    is still being evaluated.

    `stage` counts the objectives of successive halving from 0; `name` tells what a reference point
    is; `slopes` is the gradient at the point.
    """

    index: int
    stage: int
    point: Point
    value: float = math.inf
    is_done: bool = False
    name: str = ""
    seconds: float = 0.0
    slopes: tuple[float, ...] | None = None


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """From best to worst: by objective, then by the norm of the point, then by number.

    Raises NumericsError where no objective is finite.
    """
    if not any(math.isfinite(trial.value) for trial in trials):
        raise NumericsError(
            "the objective is not finite for any candidate; look for NaN in the experts, "
            "or use --dtype fp32"
        )
    return sorted(trials, key=lambda t: (t.value, math.hypot(*t.point), t.index))


class Journal:
    """The trials of one search in the file `path`; `labels` name the D numbers of a point.

    search: everything the trials depend on, as JSON.   Open while entered.
    """

    def __init__(
        self, path: Path, labels: Sequence[str], search: dict[str, Any], *, force: bool = False
    ) -> None:
        self.path, self.labels, self._force = path, list(labels), force
        self.search = json.loads(json.dumps(search))
        self.worker = uuid.uuid4().hex[:12]

    def __enter__(self) -> Self:
        """Take over the trials of this search, or begin a new journal.

        A finished search is repeated only with `force`, which also replaces the journal of another
        one; the old one is kept as a copy. Raises ConfigError where the journal belongs to another
        search, or is in use and would have to be replaced.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = file_lock(self._hidden("lock"))
            self._alive = file_lock(self._hidden(f"{self.worker}.alive"))
            self._alive.acquire()
            self.path.touch()
        try:
            with self._locked():
                self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Leave no file of a lock behind, of this process or of those that were killed."""
        with self._lock:
            _remove(self._alive)
            self._living()
            _remove(self._lock)

    def _hidden(self, word: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{word}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """While entered no other process chooses a trial or writes a line."""
        try:
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except TimeoutError as error:
            raise ConfigError(
                f"{self.path} is in use by another deme process"
                f"{holder_of(self._hidden('lock'))}; wait for it or use --output"
            ) from error
        try:
            with writing(self.path):
                with self.path.open("r+b") as file:
                    is_ours = file.read(len(_OPERATION)) == _OPERATION
                    file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
                    if is_ours and file.read() != b"\n":  # what a killed process left of a line
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                yield
        finally:
            self._lock.release()

    def _living(self) -> set[str]:
        """The other processes at work here; what those that are gone have left is removed."""
        living = set()
        for place in map(Path, glob.glob(f"{glob.escape(str(self._hidden('')))}*.alive")):
            worker = place.name.split(".")[-2]
            if worker != self.worker:
                lock = file_lock(place)
                try:
                    lock.acquire(timeout=0)
                except TimeoutError:
                    living.add(worker)
                else:
                    _remove(lock)
        return living

    def _open(self) -> None:
        """Find the study, or create it; put aside what is not of this search."""
        from optuna.study import StudyDirection

        try:
            sound, damaged = _sound_bytes(self.path)
        except ConfigError:
            if not self._force:
                raise
            sound = damaged = 0
            self._put_aside("old")
        if damaged:
            console.warn(f"{self.path}: line {damaged} is damaged; the trials before it are kept")
            self._put_aside("damaged", keep=sound)
        os.truncate(self.path, sound)
        self._storage = storage = _open_storage(self.path, self._lock)
        try:
            self._study = storage.get_study_id_from_name(STUDY)
        except KeyError:
            self._study = storage.create_new_study([StudyDirection.MINIMIZE], STUDY)
        found = storage.get_study_user_attrs(self._study).get("search")
        differing = [
            key for key in {**(found or {}), **self.search}
            if found is not None and found.get(key) != self.search.get(key)
        ]  # fmt: skip
        if self._force and (differing or self.merged):
            self._put_aside("old")
            self._open()
        elif differing:
            raise ConfigError(
                f"{self.path} holds the trials of another search (they differ in "
                f"{', '.join(differing)}); add --force to start anew, or choose another --output"
            )
        elif found is None:
            storage.set_study_user_attr(self._study, "labels", self.labels)
            storage.set_study_user_attr(self._study, "search", self.search)

    def _put_aside(self, word: str, *, keep: int = 0) -> None:
        """Go on with the first `keep` bytes alone, after a copy of the whole. Raises ConfigError
        while others work on it."""
        if self._living():
            raise ConfigError(
                f"{self.path} is in use by another deme process; wait for it or use --output"
            )
        kept = self.path.with_name(f"{self.path.name}.{word}")
        shutil.copyfile(self.path, kept)
        os.truncate(self.path, keep)
        console.note(f"{self.path}: what it held is kept in {kept}")

    @property
    def merged(self) -> str | None:
        """The fingerprint of the merged file, once it is written: the search is finished."""
        return self._storage.get_study_user_attrs(self._study).get(MERGED)

    def trials(self) -> list[Trial]:
        """All trials that count, in the order in which they were begun; lost ones do not."""
        return _trials_of(self._storage, self._study, self.labels)

    @contextmanager
    def asking(self) -> Iterator[list[Trial]]:
        """While entered nobody else chooses a trial; gives them, those of dead processes freed."""
        with self._locked():
            found = self._storage.get_all_trials(self._study, deepcopy=False)
            running = [frozen for frozen in found if not frozen.state.is_finished()]
            living = {self.worker} | (self._living() if running else set())
            for frozen in running:
                if frozen.user_attrs["worker"] not in living:
                    self.finish(frozen._trial_id, None)
            yield self.trials()

    def start(self, stage: int, point: Sequence[float], name: str = "") -> int:
        """Note that this process evaluates `point`; returns the trial's id. While asking."""
        from optuna.distributions import FloatDistribution
        from optuna.trial import TrialState, create_trial

        params = dict(zip(self.labels, point, strict=True))
        template = create_trial(
            state=TrialState.RUNNING, params=params,
            distributions={
                label: FloatDistribution(min(-1.0, w), max(2.0, w)) for label, w in params.items()
            },
            user_attrs={"rung": stage, "name": name, "worker": self.worker},
        )  # fmt: skip
        return self._storage.create_new_trial(self._study, template)

    def finish(
        self, trial: int, value: float | None, slopes: Sequence[float] | None = None
    ) -> None:
        """Note the objective of a trial that this process has started; not finite: a broken one;
        None: it will not be finished, and its point is free again."""
        from optuna.trial import TrialState

        with self._locked():
            if slopes is not None:
                self._storage.set_trial_user_attr(trial, "slopes", list(slopes))
            if value is None:
                self._storage.set_trial_state_values(trial, TrialState.FAIL)
            else:
                values = [value if math.isfinite(value) else math.inf]
                self._storage.set_trial_state_values(trial, TrialState.COMPLETE, values)

    @contextmanager
    def ending(self, check: Callable[[], None]) -> Iterator[bool]:
        """While entered no other process writes the end; gives whether one has. `check` is called
        while another is at it, and raises to stop."""
        lock = file_lock(self._hidden("end"))
        while not lock.is_locked:
            check()
            with suppress(TimeoutError):
                lock.acquire(timeout=_WAIT_SECONDS)
        try:
            yield self.merged is not None
        finally:
            _remove(lock)

    def mark_merged(self, fingerprint: str) -> None:
        """Note that the merged file was written."""
        with self._locked():
            self._storage.set_study_user_attr(self._study, MERGED, fingerprint)


def read_journal(path: Path) -> tuple[dict[str, Any], list[str], list[Trial], str | None]:
    """A journal as it is: the search, the names of its numbers, its trials, the merged file.

    Raises MissingError for no file, ConfigError or ArtifactError for no journal of a merge.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such journal of trials")
    if damaged := _sound_bytes(path)[1]:
        raise ArtifactError(
            f"{path}: line {damaged} is damaged; run its search again, which keeps what stands "
            f"before it"
        )
    storage = _open_storage(path, None)
    try:
        study = storage.get_study_id_from_name(STUDY)
        attributes = storage.get_study_user_attrs(study)
        search, labels = attributes["search"], attributes["labels"]
    except KeyError as error:
        raise ConfigError(f"{path} holds no search of `deme merge`") from error
    return search, labels, _trials_of(storage, study, labels), attributes.get(MERGED)


def _trials_of(storage: JournalStorage, study: int, labels: Sequence[str]) -> list[Trial]:
    """optuna's trials as ours, without those that were lost."""
    from optuna.trial import TrialState

    trials = []
    for frozen in storage.get_all_trials(study, deepcopy=False):
        if frozen.state != TrialState.FAIL:
            told, duration = frozen.user_attrs, frozen.duration
            trials.append(Trial(
                frozen.number, told["rung"], tuple(frozen.params[label] for label in labels),
                frozen.values[0] if frozen.values else math.inf, frozen.values is not None,
                told["name"], max(duration.total_seconds(), 0.0) if duration else 0.0,
                tuple(told["slopes"]) if "slopes" in told else None,
            ))  # fmt: skip
    return trials


def _open_storage(path: Path, lock: Any) -> JournalStorage:
    """The journal as optuna's storage. Raises ArtifactError where a line makes no sense."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ArtifactError(
            f"{path}: not a whole journal of trials ({error}); restore it, or add --force"
        ) from error


def _sound_bytes(path: Path) -> tuple[int, int]:
    """The bytes before the first damaged line, and its number: 0 where all are whole, a torn last
    one aside. Raises ConfigError for a file that is no journal."""
    sound, lines = 0, path.read_bytes().split(b"\n")
    if not _OPERATION.startswith(lines[0][: len(_OPERATION)]):
        raise ConfigError(
            f"{path} holds no journal of trials that this deme reads; add --force to "
            f"replace it, or choose another --output"
        )
    for number, line in enumerate(lines[:-1], start=1):
        try:
            json.loads(line)
        except ValueError:
            return sound, number
        sound += len(line) + 1
    return sound, 0


def _remove(lock: Any) -> None:
    """Release a lock and remove its file; whoever waits for it takes a new one."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
