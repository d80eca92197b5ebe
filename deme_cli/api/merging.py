"""`merge` and `search`: one network of the base's size from the experts of its ranges (Eq. 8)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
from deme_cli.api.merge_report import report, show_trials
from deme_cli.config import MergeConfig
from deme_cli.distributed import ALONE, Lost, World
from deme_cli.errors import ConfigError, MissingError
from deme_cli.files import require_output, write_whole
from deme_cli.jobs import StopRequests
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.artifacts import MergedRecord
    from deme_cli.merging.coefficients import Coefficients
    from deme_cli.merging.request import Request
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.merging.search.journal import Journal
    from deme_cli.merging.search.objectives import Objective, Workbench
    from deme_cli.merging.search.report import Row
    from deme_cli.merging.search.search import Conclusion, Search
    from deme_cli.merging.search.trials import Trial as Trial

MERGED_NAME = "merged.safetensors"
MOST_SHOWN = 8  # coefficients named in a line about one trial
WORST_MISFIT = 0.1  # of a profile of an EMA, as a share of its norm
_ASK_SECONDS = 1.0  # between two looks for a process of the launch that has failed
_REASONS = {
    "loss": "it draws no images; it may rank models otherwise than the distance of their images",
    "experts": "it draws no images; the merged network is to say what the experts say",
    "kid": "the images themselves are compared with real ones, without bias from their number",
    "fid": "the images themselves are compared with real ones, as `deme eval` does",
}


@dataclass(frozen=True)
class MergeResult:
    """A merged artifact: its record has experts, coefficients, and what search and report found.

    files: the picture and the journal of a search.
    """

    path: Path
    record: MergedRecord
    files: tuple[Path, ...] = ()


def merge(
    parents: Sequence[Path],
    settings: MergeConfig | None = None,
    *,
    coefficients_for: Mapping[str, Sequence[float]] | None = None,
    ema_length: float | None = None,
    base: Path | None = None,
    output: Path = Path(MERGED_NAME),
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    force: bool = False,
) -> MergeResult:
    """theta + sum_i w_i tau_i of experts or task vectors of one base, as one artifact (Eq. 8).

    settings: the coefficients (None: 1/N each), the method of combining, the search; those of `run`
    if None. Lists with a value for each expert are in the order of `parents` where you give them,
    in the order of the experts' ranges where `run.settings` takes them from its deme.toml.
    coefficients_for: other coefficients by glob of tensor names.
    ema_length: take `parents` as snapshots of one run and make the average of that length (EDM2).
    base: None for that of `run`, or the one beside the parents.   run: the settings of a deme.toml,
    of which a search reads images and sampling; the defaults without.

    Raises ConfigError, MissingError, ArtifactError, NumericsError; then no output appears. Raises
    Stopped after a signal; a search then goes on when it is called again.
    """
    result = merge_together(
        parents, settings, coefficients_for=coefficients_for, ema_length=ema_length, base=base,
        output=output, run=run, pipeline=pipeline, device=device, dtype=dtype, force=force,
    )  # fmt: skip
    assert result is not None, "a process that is alone is the first"
    return result


def search(
    parents: Sequence[Path],
    settings: MergeConfig | None = None,
    *,
    coefficients_for: Mapping[str, Sequence[float]] | None = None,
    base: Path | None = None,
    output: Path = Path(MERGED_NAME),
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    force: bool = False,
) -> MergeResult:
    """Merge with the coefficients that a search finds; a stopped one goes on when called again.

    settings: None for a grid by held-out loss.   coefficients_for: kept as they are given, by glob.
    The coefficients are chosen on one set of seeds and images and, unless `settings.report` is
    False, reported on another: `record.search`, `record.report`. The rest is as for `merge`.
    """
    settings = settings or MergeConfig(search="grid")
    if settings.search == "none":
        raise ConfigError("search = 'none' looks for nothing; name one, as in search = 'grid'")
    return merge(
        parents, settings, coefficients_for=coefficients_for, base=base, output=output, run=run,
        pipeline=pipeline, device=device, dtype=dtype, force=force,
    )  # fmt: skip


def merge_together(
    parents: Sequence[Path],
    settings: MergeConfig | None = None,
    *,
    coefficients_for: Mapping[str, Sequence[float]] | None = None,
    ema_length: float | None = None,
    base: Path | None = None,
    output: Path = Path(MERGED_NAME),
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    force: bool = False,
    world: World = ALONE,
    dry_run: bool = False,
) -> MergeResult | None:
    """`merge` by the processes of `world`, of which all but the first only help with the trials of
    a search and get None, as does a dry run, which checks everything and says what would be done.
    """
    from deme_cli.merging.request import open_request
    from deme_cli.merging.search.measure import find_measure

    run = run or RunFile()
    request = open_request(
        parents, settings or run.settings(MergeConfig), fixed=coefficients_for or {},
        ema_length=ema_length, base=base, output=output, run=run, pipeline=pipeline,
        device=device, dtype=dtype, force=force,
    )  # fmt: skip
    if dry_run:
        if request.searches:
            source = find_measure(request).source
            grid = request.grid()
            what = f"the grid {grid}" if grid else request.settings.search
            plan = f"the best of {what} by {request.settings.objective} on {source}"
        else:
            given = request.coefficients()
            values = given.values if given else [1 / len(parents)] * len(parents)
            w = ", ".join(f"{w:g}" for w in values)
            plan = f"method {request.method.name}, coefficients {w}"
        console.note(f"would merge {len(parents)} artifacts into {output}: {plan}")
        return None
    return _searched(request, world) if request.searches else _given(request)


def _given(request: Request) -> MergeResult:
    """A merge by coefficients that are known, and its report if one was asked for."""
    from deme_cli.merging.search.report import MERGED

    given, count, document = request.coefficients(), len(request.family.parents), None
    if given is None and request.method.name != "model-stock":
        console.note(f"no coefficients given: 1/{count} each; --search grid looks for better ones")
    if request.reports:
        bench, evaluator = _open_bench(request, with_slopes=False)
        values = None if given is None else given.values
        merged: Row = (MERGED, values, lambda: evaluator.denoiser(given))
        document = report(request, bench, evaluator, None, merged)
    return _write(request, given, _origin(request, given), document)


def _origin(request: Request, given: Coefficients | None) -> dict[str, Any] | None:
    """How the coefficients came about, where an EMA length made them; warns of a bad fit."""
    if request.ema_length is None or given is None:
        return None
    from deme_cli.merging.power_ema import misfit, snapshots_of

    snapshots = snapshots_of([parent.record for parent in request.family.parents])
    step = max(t for t, _ in snapshots)
    off = misfit(snapshots, given.values, step, request.ema_length)
    if off > WORST_MISFIT:
        console.warn(
            f"these snapshots meet the profile of length {request.ema_length:g} only up to "
            f"{100 * off:.0f} %; save more of them, or ask for a length between theirs"
        )
    return {
        "method": "post-hoc EMA", "ema_length": request.ema_length, "step": step, "misfit": off,
        "best": None, "evaluations": 0,
    }  # fmt: skip


def _write(
    request: Request, given: Coefficients | None, searched: dict[str, Any] | None,
    document: dict[str, Any] | None, files: tuple[Path, ...] = (),
) -> MergeResult:  # fmt: skip
    from deme_cli.merging.combine import merge_family

    num_bytes = sum(spec.num_bytes for spec in request.family.base.tensors.values())
    with console.progress("merging", num_bytes, "byte") as bar:
        record = merge_family(
            request.family, given, request.output, method=request.method, search=searched,
            report=document, advance=bar.advance,
        )  # fmt: skip
    return MergeResult(request.output, record, files)


def _open_bench(
    request: Request, *, with_slopes: bool, store: Path | None = None
) -> tuple[Workbench, Evaluator]:
    """What opens objectives, and the network that takes each candidate's weights."""
    from deme_cli.merging.search.distances import FeatureStore
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.merging.search.measure import find_measure
    from deme_cli.merging.search.objectives import Workbench

    bench = Workbench(
        find_measure(request),
        request.family.base_record,
        store=FeatureStore(store) if store else None,
    )
    evaluator = Evaluator(
        request.family, request.space(), method=request.method, device=request.device,
        dtype=request.dtype, with_slopes=with_slopes,
    )  # fmt: skip
    return bench, evaluator


def _searched(request: Request, world: World) -> MergeResult | None:
    """Run the trials that are left, and write the best; only one process of many does the end."""
    from deme_cli.artifacts import read_record
    from deme_cli.merging.search.journal import Journal
    from deme_cli.merging.search.measure import find_measure
    from deme_cli.merging.search.report import MERGED
    from deme_cli.merging.search.search import conclude

    found, path = request.search(), journal_path(request.output)
    _name_objective(request, found, find_measure(request).source)
    with console.waiting("loading the libraries, the network and the images"):
        store = path.with_name(f".{path.name}.features") if len(request.rungs) > 1 else None
        bench, evaluator = _open_bench(
            request, with_slopes=request.settings.search == "gradient", store=store
        )
    if not all(rung.is_distance for rung in request.rungs):
        fill_with_bar(bench.examples, world=world)
    objectives = [
        bench.open(rung, request.settings, experts=evaluator.ensemble) for rung in request.rungs
    ]
    evaluator.objectives = objectives
    evaluator.open()
    journal = Journal(path, found.space.labels, request.describe(objectives))
    _run_trials(request, found, journal, evaluator, world)
    if not world.is_first:
        return None
    end = conclude(found, journal.trials(), objectives, evaluator.ranges)
    picture = _tell(request, found, end, objectives, journal.trials())
    with StopRequests() as stop:

        def check(*progress: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped; all trials are kept, run the same command again")

        while (is_ours := journal.take_the_end()) is None:
            check()
            time.sleep(0.5)
        if not is_ours and request.output.exists():
            console.note(f"{request.output} was written by another process of this search")
            record = read_record(request.output, "merged")
            return MergeResult(request.output, record, (picture, path))
        best = end.best.point
        given, document = found.space.coefficients(best), None
        if request.reports:
            merged: Row = (MERGED, given.values, lambda: evaluator.model(best))
            soup = found.soup(journal.trials())
            document = report(request, bench, evaluator, soup, merged)
        check()
        result = _write(
            request, given, _record(request, end, objectives), document, (picture, path)
        )
    journal.mark_merged(result.record.fingerprint)
    if bench.store:
        bench.store.clear()
    return result


def journal_path(output: Path) -> Path:
    """The trials of the search for `output`."""
    return output.with_name(f"{output.stem}.trials.jsonl")


def _name_objective(request: Request, found: Search, source: str) -> None:
    """What is minimised, and why one would."""
    names = [rung.name for rung in request.rungs]
    is_default = request.settings.objective == MergeConfig.objective
    console.note(
        f"search {found.method}, about {found.expected} trials, by "
        f"{request.settings.objective}{' (the default)' if is_default else ''} on {source}: "
        f"{_REASONS[names[-1]]}"
    )


def _run_trials(
    request: Request, found: Search, journal: Journal, evaluator: Evaluator, world: World
) -> None:
    """Evaluate the trials that are left, shown as they come.

    Raises Stopped after a signal, Lost where another process of the launch has failed.
    """
    shown, labels = set[int](), [one.label for one in evaluator.objectives]
    failed_at = time.monotonic()
    with (
        StopRequests() as stop,
        console.progress(found.method, found.expected, "trial") as bar,
    ):

        def kept() -> str:
            done = sum(trial.is_done for trial in journal.trials())
            return (
                f"{done} trials are saved in {journal.path}; run the same command again to continue"
            )

        def check(*progress: int) -> None:
            nonlocal failed_at
            if stop.asked:
                raise stop.stopped(kept())
            if time.monotonic() - failed_at >= _ASK_SECONDS:  # each question is a message
                failed_at = time.monotonic()
                if world.failure():
                    raise Lost(f"another process of this launch has ended; {kept()}")

        def show() -> None:
            """Each new trial as a line, and the best so far in the bar."""
            done = [trial for trial in journal.trials() if trial.is_done]
            for trial in done:
                if trial.index not in shown:
                    shown.add(trial.index)
                    bar.say(_line(found, trial, labels[trial.rung]))
            if done:
                rung = max(trial.rung for trial in done)
                best = min(trial.value for trial in done if trial.rung == rung)
                bar.advance(len(done), f"best {labels[rung]} {best:#.5g}")

        def between() -> None:
            check()
            if not world.is_alone:
                show()  # also while this one waits for others

        evaluator.check = check
        if done := _open_journal(request, journal, world):
            console.note(f"{journal.path}: continuing after {done} trials")
            shown.update(trial.index for trial in journal.trials() if trial.is_done)
        for _ in found.run(journal, evaluator, between):
            show()
        show()


def _open_journal(request: Request, journal: Journal, world: World) -> int:
    """How many trials are done. The first process opens it, and where it was asked to, empties it;
    and none ends the search before all have looked at its output."""
    world.require_same({"output": str(request.output), **journal.search})
    world.wait()  # nothing is begun before all agree
    with world.first_before_others():
        return journal.open(force=request.force and world.is_first)


def _line(found: Search, trial: Trial, label: str) -> str:
    """`trial 17/64: held-out loss 0.09312 at w 0.200 0.100 (1.2 s)`."""
    values = found.space.summary(trial.point)
    more = f" and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else ""
    w = " ".join(f"{value:.3f}" for value in values[:MOST_SHOWN]) + more
    value = f"{trial.value:#.5g}" if math.isfinite(trial.value) else "not finite"
    return (
        f"trial {trial.index + 1}/{found.expected}{f' ({trial.name})' if trial.name else ''}: "
        f"{label} {value} at {'mean w' if found.space.groups else 'w'} {w} ({trial.seconds:.1f} s)"
    )


def _tell(
    request: Request, found: Search, end: Conclusion, objectives: Sequence[Objective],
    trials: Sequence[Trial],
) -> Path:  # fmt: skip
    """What a person should know of the end, the table of the best, and the picture, its path."""
    from deme_cli.merging.search.figure import draw_search

    for text in end.warnings:
        console.warn(text)
    labels, done = [one.label for one in objectives], [t for t in trials if t.is_done]
    show_trials(
        f"The best of {len(done)} candidates", end.ranking, found.space.summary,
        found.space.experts, labels[-1], shown=found.rungs[-1].keep,
    )  # fmt: skip
    picture = request.output.with_name(f"{request.output.stem}.search.png")
    write_whole(picture, [draw_search(done, found.space.labels, labels)])
    return picture


def _record(request: Request, end: Conclusion, objectives: Sequence[Objective]) -> dict[str, Any]:
    """How the coefficients were found, as the merged file tells it."""
    grid, space, settings = request.grid(), request.space(), request.settings
    return {
        "method": settings.search,
        **end.record,
        "grid": [list(values) for values in grid] if grid else None,
        "bounds": None if grid else [list(pair) for pair in space.bounds],
        "per": settings.per,
        "seed": settings.seed,
        "num": request.rungs[-1].num,
        "protocol": {**objectives[-1].protocol, "dtype": request.dtype},
    }


def replay(
    merged: Path,
    output: Path | None = None,
    *,
    parents: Sequence[Path] = (),
    base: Path | None = None,
    run: RunFile | None = None,
    force: bool = False,
) -> MergeResult:
    """Build `merged` again as its record tells it, bit for bit.

    output: None for {merged}.replayed.safetensors.   parents, base: where they are now, if not
    where they were. Raises ArtifactError where a parent has changed or the result differs,
    MissingError where one is gone; then no output appears.
    """
    from deme_cli.merging import replay as replaying

    target = output or merged.with_name(f"{merged.stem}.replayed.safetensors")
    require_output(target, force=force)
    record = replaying.replay(merged, target, parents=parents, base=base, run=run or RunFile())
    return MergeResult(target, record)


@dataclass(frozen=True)
class ShownSearch:
    """The trials of a journal, `labels` of their numbers; best: a trial of the last rung. Without a
    finite trial there is none, nor a picture."""

    journal: Path
    search: Mapping[str, Any]
    labels: Sequence[str]
    trials: Sequence[Trial]
    is_finished: bool
    best: Trial | None = None
    picture: Path | None = None

    @property
    def objectives(self) -> list[str]:
        """What each rung measures."""
        return [objective["name"] for objective in self.search["objectives"]]

    def best_of_rung(self, rung: int) -> list[Trial]:
        """The measured trials of a rung, the best first."""
        own = [trial for trial in self.trials if trial.is_done and trial.rung == rung]
        return sorted(own, key=lambda trial: (trial.value, trial.index))


def show_search(path: Path) -> ShownSearch:
    """Read the trials of a search, finished or not, and draw them beside its journal.

    path: the journal, or the merged file that lies beside it. Raises MissingError, ArtifactError.
    """
    from deme_cli.merging.search.figure import best_of, draw_search
    from deme_cli.merging.search.journal import read_journal

    journal = journal_path(path) if path.suffix == ".safetensors" else path
    if not journal.is_file() and journal != path:
        raise MissingError(f"{path}: no journal of its search beside it ({journal.name})")
    found, labels, trials, merged = read_journal(journal)
    shown = ShownSearch(journal, found, labels, trials, merged is not None)
    done = [trial for trial in trials if trial.is_done]
    if not any(math.isfinite(trial.value) for trial in done):
        return shown
    picture = journal.with_suffix(".png")
    write_whole(picture, [draw_search(done, labels, shown.objectives)])
    return ShownSearch(journal, found, labels, trials, shown.is_finished, best_of(done), picture)
