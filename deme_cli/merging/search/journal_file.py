"""The file of a journal: its lock, torn lines, and reading one that somebody else has written."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.outputs import file_lock, holder_of

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from optuna.storages import JournalStorage

STUDY = "deme-merge"
_SECONDS = 120.0  # waited for a lock that the system does not let go of with its holder
_BEGINNING = b'{"op_code"'  # of every line that optuna writes


class JournalLock:
    """Exclusive use of a journal, let go of by the system when its holder dies; may be nested.

    Has the interface of optuna's file locks. A line that a killed process left torn is cut off when
    the lock is taken, before anybody appends to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = self._path.with_name(f".{self._path.name}.lock")

    @functools.cached_property
    def _lock(self) -> BaseFileLock:
        return file_lock(self._place)

    def acquire(self) -> bool:
        from filelock import SoftFileLock

        left_behind = isinstance(self._lock, SoftFileLock)  # it may be, by a host that is gone
        try:
            self._lock.acquire(timeout=_SECONDS if left_behind else -1)
        except TimeoutError as error:
            raise ConfigError(
                f"{self._path} is in use by another deme process{holder_of(self._place)}; wait for "
                f"it or use --output"
            ) from error
        if self._lock.lock_counter == 1:
            self._cut_torn_line()
        return True

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> JournalLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def tidy(self) -> None:
        """Remove the lock's file, unless somebody works on the journal, who will.

        Whoever waits for it meanwhile gets a file without a name, and filelock takes a new one.
        """
        with suppress(OSError), self:  # a file that stays does no harm
            if not any(self._path.parent.glob(f".{escape(self._path.name)}.*.worker")):
                self._place.unlink(missing_ok=True)

    def _cut_torn_line(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            head = file.read(len(_BEGINNING))
            if not _BEGINNING.startswith(head) or not head:
                return  # not a journal: nothing of ours to cut
            size = file.seek(0, 2)
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def open_storage(path: Path, lock: JournalLock) -> JournalStorage:
    """The journal as optuna's storage. Raises ArtifactError where a line makes no sense."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    require_journal(path)
    try:
        # Of the interface that optuna asks for, not of its class, which is slow to import.
        backend = JournalFileBackend(str(path), lock_obj=lock)  # type: ignore[arg-type]
        storage = JournalStorage(backend)
        if lines := path.read_bytes().splitlines():
            json.loads(lines[-1])  # optuna passes over the last one until something follows it
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ArtifactError(
            f"{path}: not a whole journal of trials ({error}); restore it, or add --force"
        ) from error
    return storage


def require_journal(path: Path) -> None:
    """Check the first line. Raises ConfigError for a file that is no journal of optuna's."""
    if not path.exists():
        return
    with path.open("rb") as file:
        line = file.readline()
    if not line:
        return
    try:
        sound = "op_code" in json.loads(line)
    except (ValueError, TypeError):
        sound = False
    if not sound:
        raise ConfigError(
            f"{path} holds no journal of trials that this deme reads; add --force to replace it, "
            f"or choose another --output"
        )


@dataclass(frozen=True)
class JournalDocument:
    """What a journal tells: the search, the names of the numbers, its trials, and its end."""

    search: dict[str, Any]
    labels: list[str]
    trials: list[Any]  # optuna's FrozenTrial
    merged: str | None


def read_journal(path: Path, held: JournalLock | None = None) -> JournalDocument:
    """A journal as it is, locked for no longer than the reading takes.

    held: the caller's own lock of it, where it has one.
    Raises MissingError for no file, ConfigError or ArtifactError for no journal of a merge.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such journal of trials")
    lock = held or JournalLock(path)
    try:
        with lock:
            storage = open_storage(path, lock)
            study = storage.get_study_id_from_name(STUDY)
            attributes = storage.get_study_user_attrs(study)
            trials = storage.get_all_trials(study)
    except KeyError as error:
        raise ConfigError(f"{path} holds no search of `deme merge`") from error
    finally:
        if held is None:
            lock.tidy()
    if "search" not in attributes:
        raise ConfigError(f"{path} holds no search of `deme merge`")
    return JournalDocument(
        attributes["search"], attributes["labels"], trials, attributes.get("merged")
    )


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which entries of two searches differ, in words."""
    names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return f"they differ in {', '.join(names)}"
