"""Trials on disk: an optuna journal beside the output, shared by any number of processes.

optuna keeps the file, one line per operation, and its tools read it. What is ours: one lock around
the choice of the next trial; trials of processes that are gone are free again; each result is a
line that stands for itself, so that a damaged journal gives back every other result; and what is
replaced is kept as a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.errors import ArtifactError, ConfigError, MissingError, writing
from deme_cli.jobs import file_lock, holder_of
from deme_cli.merging.space import Trial

if TYPE_CHECKING:
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

STUDY = "deme-merge"
RESULT, LOST, MERGED, CLOSING = "result", "lost", "merged", "closing"
_LOCK_SECONDS = 120.0  # waited for a lock, which nobody holds for long
_FOREIGN_SECONDS = 1800.0  # after which a process on another machine counts as gone
_OPERATION = re.compile(r'\{"op_code"')  # how every line of optuna's begins


class Journal:
    """The trials of one search in the file `path`; `labels` name the D numbers of a point.

    search: everything the trials depend on, as JSON.
    """

    def __init__(self, path: Path, labels: Sequence[str], search: dict[str, Any]) -> None:
        self.path, self.labels = path, list(labels)
        self.search = json.loads(json.dumps(search))
        self._storage: JournalStorage | None = None
        self._study = -1
        self._done: dict[int, Trial] = {}  # which do not change any more, by number

    @property
    def checksum(self) -> str:
        """Of what is searched, in every result: it says whose they are when all else is lost."""
        text = json.dumps([self.labels, self.search], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def open(self, *, force: bool) -> int:
        """Take over the trials of this search, or begin a new journal; returns how many are done.

        A finished search is repeated only with `force`, which also replaces the journal of another
        one; a copy of the old one is kept. Raises ConfigError where the journal belongs to another
        search, or is in use and would have to be replaced.
        """
        with _using(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path, "ask"):
                if force and self.path.exists() and self.path.stat().st_size:
                    self._make_room()
                self._mend()
                self._storage = _open_storage(self.path)
                self._claim_study()
        return sum(trial.is_done for trial in self.trials())

    def _make_room(self) -> None:
        """Put aside what is in the way of a new search; an unfinished one of this search stays."""
        search, merged, trials = None, None, list[Trial]()
        with suppress(ConfigError):  # no journal at all
            _require_journal(self.path)
            self._mend()
            with suppress(ArtifactError):
                search, _, trials, merged = read_journal(self.path)
        if search == self.search and not merged:
            return
        if any(not t.is_done and not is_gone(t.extra["worker"], t.began) for t in trials):
            raise ConfigError(
                f"{self.path} is in use by another deme process; wait for it or use --output"
            )
        kept = _put_aside(self.path, "old")
        console.note(f"{self.path}: begins anew, its trials so far are kept in {kept}")

    def _mend(self) -> None:
        """Write a journal with damaged lines anew from the results that can be read; keep a copy.

        Raises ArtifactError while another process works on it, which would lose its place.
        """
        path = self.path
        if not path.exists() or not path.stat().st_size:
            return
        _require_journal(path)
        damaged, operations = _read_lines(path)
        if not damaged:
            return
        workers = {op.get("user_attrs", {}).get("worker", "") for op in operations}
        if any(not is_gone(w, path.stat().st_mtime) for w in workers - {this_process()}):
            raise ArtifactError(
                f"{path}: {damaged} of its lines are damaged, and another deme process works on "
                f"it; wait until it has ended and run the same command again"
            )
        told = [op["user_attr"] for op in operations if "user_attr" in op]
        study = {key: value for one in told for key, value in one.items()}
        results = {(r["rung"], *r["point"]): r for one in told if (r := one.get(RESULT))}
        if not {"labels", "search"} <= study.keys():
            results = {k: r for k, r in results.items() if r["search"] == self.checksum}
            study = {"labels": self.labels, "search": self.search}
        kept = _put_aside(path, "damaged")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        anew = Journal(partial, study["labels"], study["search"])
        anew._storage = _open_storage(partial)
        anew._claim_study()
        for r in results.values():
            number = anew.start(r["rung"], r["point"], r["name"])
            anew._set(number, RESULT, r)
            anew._end(number, math.inf if r["value"] is None else r["value"])
        if MERGED in study:
            anew.mark_merged(study[MERGED])
        os.replace(partial, path)
        console.warn(
            f"{path}: {damaged} of its lines were damaged; {len(results)} finished trials could be "
            f"read and are kept, the file as it was is {kept}"
        )

    def _claim_study(self) -> None:
        """Find the study, or create it; check that it is of this search."""
        from optuna.study import StudyDirection

        storage = self._opened
        try:
            self._study = storage.get_study_id_from_name(STUDY)
        except KeyError:
            self._study = storage.create_new_study([StudyDirection.MINIMIZE], STUDY)
        found = storage.get_study_user_attrs(self._study).get("search")
        if found is None:
            storage.set_study_user_attr(self._study, "labels", self.labels)
            storage.set_study_user_attr(self._study, "search", self.search)
        elif found != self.search:
            names = [k for k in {**found, **self.search} if found.get(k) != self.search.get(k)]
            raise ConfigError(
                f"{self.path} holds the trials of another search (they differ in "
                f"{', '.join(names)}); add --force to start anew, or choose another --output"
            )

    @property
    def _opened(self) -> JournalStorage:
        assert self._storage is not None, "the journal is not open"
        return self._storage

    def trials(self) -> list[Trial]:
        """All trials that count, in the order in which they were begun; lost ones do not."""
        with _using(self.path):
            found = self._opened.get_all_trials(self._study, deepcopy=False)
        return _trials_of(found, self.labels, self._done)

    @contextmanager
    def asking(self) -> Iterator[list[Trial]]:
        """While entered nobody else chooses a trial; gives them, those of dead processes freed."""
        with _using(self.path), _locked(self.path, "ask"):
            trials = self.trials()
            gone = [t for t in trials if not t.is_done and is_gone(t.extra["worker"], t.began)]
            for trial in gone:
                self._lose(trial.index)
            yield [trial for trial in trials if trial not in gone]

    def start(self, stage: int, point: Sequence[float], name: str = "") -> int:
        """Note that this process evaluates `point`; returns the trial's number. While asking."""
        from optuna.distributions import BaseDistribution, FloatDistribution
        from optuna.trial import TrialState, create_trial

        kinds: dict[str, BaseDistribution] = {
            label: FloatDistribution(min(-1.0, w), max(2.0, w))
            for label, w in zip(self.labels, point, strict=True)
        }
        template = create_trial(
            state=TrialState.RUNNING, params=dict(zip(self.labels, point, strict=True)),
            distributions=kinds, user_attrs={"rung": stage, "name": name, "worker": this_process()},
        )  # fmt: skip
        storage = self._opened
        return storage.get_trial_number_from_id(storage.create_new_trial(self._study, template))

    def finish(self, number: int, value: float, extra: dict[str, Any] | None = None) -> None:
        """Note the objective of a trial that this process has started; not finite: a broken one.

        Nothing is noted of a trial that another process took for lost.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        with _using(self.path):
            frozen = self._opened.get_trial(self._id_of(number))
        own = _trial_of(frozen, self.labels)
        if own is None:
            return
        result = {
            "rung": own.stage, "name": own.name, "point": own.point, "began": own.began,
            "value": value if math.isfinite(value) else None, "ended": time.time(),
            "extra": extra or {}, "search": self.checksum,
        }  # fmt: skip
        with _using(self.path):
            try:
                self._set(number, RESULT, result)
                self._end(number, value)
            except UpdateFinishedTrialError:
                pass

    def give_back(self, number: int) -> None:
        """Free the point of a trial that this process will not finish."""
        with _using(self.path):
            self._lose(number)

    def _lose(self, number: int) -> None:
        self._set(number, LOST, True)
        self._end(number, math.inf)

    def _set(self, number: int, key: str, value: Any) -> None:
        self._opened.set_trial_user_attr(self._id_of(number), key, value)

    def _id_of(self, number: int) -> int:
        return self._opened.get_trial_id_from_study_id_trial_number(self._study, number)

    def _end(self, number: int, value: float) -> None:
        from optuna.trial import TrialState

        is_good = math.isfinite(value)
        self._opened.set_trial_state_values(
            self._id_of(number),
            TrialState.COMPLETE if is_good else TrialState.FAIL,
            [value] if is_good else None,
        )

    def take_the_end(self) -> bool | None:
        """Whether this process is to write the merged file; None while another one is about to."""
        with _using(self.path), _locked(self.path, "ask"):
            if self.merged is not None:
                return False
            closing = self._opened.get_study_user_attrs(self._study).get(CLOSING)
            if closing and closing[0] != this_process() and not is_gone(*closing):
                return None
            self._opened.set_study_user_attr(self._study, CLOSING, [this_process(), time.time()])
            return True

    def mark_merged(self, fingerprint: str) -> None:
        """Note that the merged file was written: the search is finished."""
        with _using(self.path):
            self._opened.set_study_user_attr(self._study, MERGED, fingerprint)

    @property
    def merged(self) -> str | None:
        """The fingerprint of the merged file, once it is written."""
        return self._opened.get_study_user_attrs(self._study).get(MERGED)


def read_journal(path: Path) -> tuple[dict[str, Any], list[str], list[Trial], str | None]:
    """A journal as it is: the search, the names of its numbers, its trials, the merged file.

    Raises MissingError for no file, ConfigError or ArtifactError for no journal of a merge.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such journal of trials")
    _require_journal(path)
    damaged, _ = _read_lines(path)
    if damaged:
        raise ArtifactError(
            f"{path}: {damaged} of its lines are damaged; run its search again, which mends it"
        )
    storage = _open_storage(path)
    try:
        study = storage.get_study_id_from_name(STUDY)
        attributes = storage.get_study_user_attrs(study)
        search, labels = attributes["search"], attributes["labels"]
    except KeyError as error:
        raise ConfigError(f"{path} holds no search of `deme merge`") from error
    trials = _trials_of(storage.get_all_trials(study, deepcopy=False), labels)
    return search, labels, trials, attributes.get(MERGED)


def _trials_of(
    found: Sequence[FrozenTrial], labels: Sequence[str], known: dict[int, Trial] | None = None
) -> list[Trial]:
    """optuna's trials as ours, without those that were lost, and each point once in each stage.

    known: those that are done, by number; what is found is added.
    """
    known = {} if known is None else known
    trials: dict[tuple, Trial] = {}
    for frozen in found:
        trial = known.get(frozen.number) or _trial_of(frozen, labels)
        if trial is None:
            continue
        if trial.is_done:
            known[frozen.number] = trial
        key = (trial.stage, trial.point)
        if key not in trials or (trial.is_done and not trials[key].is_done):
            trials[key] = trial
    return sorted(trials.values(), key=lambda trial: trial.index)


def _trial_of(frozen: FrozenTrial, labels: Sequence[str]) -> Trial | None:
    """None for one that was lost."""
    attributes = frozen.user_attrs
    if attributes.get(LOST):
        return None
    if result := attributes.get(RESULT):  # it stands for itself, whatever trial it lies with
        value = math.inf if result["value"] is None else result["value"]
        return Trial(
            frozen.number, result["rung"], tuple(result["point"]), value, result["name"],
            result["began"], result["ended"], result["extra"],
        )  # fmt: skip
    began, ended = (
        moment.timestamp() if moment else 0.0
        for moment in (frozen.datetime_start, frozen.datetime_complete)
    )
    value, is_done = None, frozen.state.is_finished()  # the latter as an older deme wrote it
    if is_done:
        value = frozen.values[0] if frozen.values else math.inf
    return Trial(
        frozen.number, attributes["rung"], tuple(frozen.params[label] for label in labels), value,
        attributes["name"], began, ended, {} if is_done else {"worker": attributes["worker"]},
    )  # fmt: skip


@cache
def this_process() -> str:
    """This process, as a word that no other ever has: machine, number, and when it began."""
    return f"{socket.gethostname()}:{os.getpid()}:{_born(os.getpid())}"


def _born(pid: int) -> str | None:
    """When a process of this machine began, in ticks; None where there is none (or no /proc)."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else numbers[18]  # a dead one that nobody has waited for yet


def is_gone(process: str, began: float) -> bool:
    """Whether a process has ended; one on another machine, which cannot be asked, counts as gone
    half an hour after `began`."""
    host, _, rest = process.partition(":")
    pid, _, born = rest.partition(":")
    if not pid.isdigit():
        return True  # as an older deme called them
    if host != socket.gethostname():
        return time.time() - began > _FOREIGN_SECONDS
    if _born(os.getpid()) is not None:
        return _born(int(pid)) != born
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def _using(path: Path) -> Iterator[None]:
    """Translate what goes wrong with the file."""
    try:
        with writing(path):
            yield
    except ValueError as error:  # a line that is no JSON, with others behind it
        raise ArtifactError(
            f"{path}: was damaged while it was in use ({error}); run the same command again, which "
            f"keeps what can be read"
        ) from error


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """While entered no other process is here. Raises ConfigError where one does not leave."""
    place = path.with_name(f".{path.name}.{what}.lock")
    lock = file_lock(place)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"{path} is in use by another deme process{holder_of(place)}; wait for it or use "
            f"--output"
        ) from error
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # whoever waits for it takes a new one
        lock.release()


def _open_storage(path: Path) -> JournalStorage:
    """The journal as optuna's storage. Raises ArtifactError where a line makes no sense."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    class Backend(JournalFileBackend):
        """Writes under a lock of ours, and cuts off a line that a killed process left torn."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            with _locked(path, "write"), path.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _require_journal(path)
    try:
        return JournalStorage(Backend(str(path)))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ArtifactError(
            f"{path}: not a whole journal of trials ({error}); restore it, or add --force"
        ) from error


def _require_journal(path: Path) -> None:
    """Raises ConfigError for a file of which no line is of optuna's."""
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if not any(_OPERATION.search(line.decode(errors="replace")) for line in file):
                raise ConfigError(
                    f"{path} holds no journal of trials that this deme reads; add --force to "
                    f"replace it, or choose another --output"
                )


def _read_lines(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """How many lines are damaged, a torn last one aside, and every operation that can be read."""
    decoder, damaged, operations = json.JSONDecoder(), 0, []
    for line in path.read_bytes().split(b"\n")[:-1]:
        text, whole = line.decode(errors="replace"), False
        for match in _OPERATION.finditer(text):
            try:
                operation, end = decoder.raw_decode(text, match.start())
            except ValueError:
                continue
            operations.append(operation)
            whole = whole or (match.start(), end) == (0, len(text))
        damaged += not whole
    return damaged, operations


def _put_aside(path: Path, word: str) -> Path:
    """Give the file another name, which is free."""
    for number in count(1):
        kept = path.with_name(f"{path.name}.{word}{'' if number == 1 else number}")
        if not kept.exists():
            os.replace(path, kept)
            return kept
    raise AssertionError
