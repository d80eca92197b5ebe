"""`merge`: one network of the base's size from the experts of its ranges (Eq. 8).

A merge by known coefficients loads no torch. A search evaluates trials, which its journal keeps
(search.py, journal.py), takes the best, and reports on it with other seeds and images (report.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.artifacts import MergedRecord, read_record
from deme_cli.config import MergeConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.distributed import ALONE, Lost, World
from deme_cli.jobs import StopRequests
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.show_search import ShownSearch, journal_path, show_search
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.candidates import Evaluator
    from deme_cli.merging.journal import Journal
    from deme_cli.merging.objectives import Objective, Workbench
    from deme_cli.merging.plan import MergePlan
    from deme_cli.merging.search import Conclusion, Search
    from deme_cli.merging.space import Trial

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
    """A merged artifact; `search` has the trials, where there was one.

    is_written: False after a dry run, and in processes that only helped with the trials.
    """

    path: Path
    search: ShownSearch | None = None
    is_written: bool = True

    @cached_property
    def record(self) -> MergedRecord:
        """Experts, coefficients, and what search and report found, as the file tells."""
        return read_record(self.path, "merged")

    @property
    def files(self) -> list[Path]:
        """The picture and the journal of a search."""
        found = [self.search.picture, self.search.journal] if self.search else []
        return [path for path in found if path]


def merge(
    experts: Sequence[Path], settings: MergeConfig | None = None, *,
    coefficients_for: Mapping[str, Sequence[float]] | None = None, ema_length: float | None = None,
    base: Path | None = None, output: Path = Path(MERGED_NAME), run: RunFile | None = None,
    pipeline: str | None = None, device: str = "auto", dtype: str = "fp32", force: bool = False,
    dry_run: bool = False, world: World = ALONE, progress: Progress = silent,
) -> MergeResult:  # fmt: skip
    """theta + sum_i w_i tau_i of experts or task vectors of one base, as one artifact (Eq. 8).

    settings: the coefficients (None: 1/N each), the method of combining, the search; those of `run`
    if None. Lists with a value for each expert are in the order of `experts` where you give them,
    in the order of the experts' ranges where `run.settings` takes them from its deme.toml.
    coefficients_for: other coefficients by glob of tensor names.
    ema_length: take `experts` as snapshots of one run and make the average of that length (EDM2).
    base: None for that of `run`, or the one beside the experts.   run: the settings of a deme.toml,
    of which a search reads images and sampling; the defaults without.   dry_run: check, and say
    what would be done.   world: processes that share the trials of a search.

    A search chooses the coefficients on one set of seeds and images and, unless `settings.report`
    is False, reports them on another: `record.search`, `record.report`.

    Raises ConfigError, MissingError, ArtifactError, NumericsError; then no output appears. Raises
    Stopped after a signal; a search then goes on when it is called again.
    """
    from deme_cli.merging.plan import plan_request

    run = run or RunFile()
    plan = plan_request(
        experts, settings or run.settings(MergeConfig), fixed=coefficients_for or {},
        ema_length=ema_length, base=base, output=output, run=run, pipeline=pipeline,
        device=device, dtype=dtype, force=force,
    )  # fmt: skip
    if dry_run:
        progress(Step(note=f"would merge {len(experts)} artifacts into {output}: {_told(plan)}"))
        return MergeResult(output, is_written=False)
    return _search(plan, world, progress) if plan.searches else _merge(plan, progress)


def _told(plan: MergePlan) -> str:
    """What a dry run says."""
    from deme_cli.merging.plan import find_measure

    if plan.searches:
        grid = plan.grid()
        what = f"the grid {grid}" if grid else plan.settings.search
        return f"the best of {what} by {plan.settings.objective} on {find_measure(plan).source}"
    given, count = plan.coefficients(), len(plan.inputs.experts)
    values = given.values if given else [1 / count] * count
    return f"method {plan.method.name}, coefficients {', '.join(f'{w:g}' for w in values)}"


def _merge(plan: MergePlan, progress: Progress) -> MergeResult:
    """A merge by coefficients that are known, and its report if one was asked for."""
    given, document = plan.coefficients(), None
    if given is None and plan.method.name != "model-stock":
        progress(
            Step(note=f"no coefficients given: 1/{len(plan.inputs.experts)} each; --search grid "
                      f"looks for better ones")
        )  # fmt: skip
    if plan.reports:
        from deme_cli.merging.report import MERGED, make_report
        from deme_cli.training.examples import fill_caches

        bench, evaluator = _open_bench(plan)
        fill_caches(bench.examples, progress=progress)
        values = None if given is None else given.values
        merged = (MERGED, values, lambda: evaluator.at(given))
        document = make_report(plan, bench, evaluator, None, merged, progress)
    _write(plan, given, _origin(plan, given), document, progress)
    return MergeResult(plan.output)


def _origin(plan: MergePlan, given: Coefficients | None) -> dict[str, Any] | None:
    """How the coefficients came about, where an EMA length made them; warns of a bad fit."""
    if plan.ema_length is None or given is None:
        return None
    from deme_cli.merging.power_ema import misfit, snapshots_of

    snapshots = snapshots_of([expert.record for expert in plan.inputs.experts])
    step = max(t for t, _ in snapshots)
    off = misfit(snapshots, given.values, step, plan.ema_length)
    if off > WORST_MISFIT:
        console.warn(
            f"these snapshots meet the profile of length {plan.ema_length:g} only up to "
            f"{100 * off:.0f} %; save more of them, or ask for a length between theirs"
        )
    return {
        "method": "post-hoc EMA", "ema_length": plan.ema_length, "step": step, "misfit": off,
        "best": None, "evaluations": 0,
    }  # fmt: skip


def _write(
    plan: MergePlan, given: Coefficients | None, searched: dict[str, Any] | None,
    document: dict[str, Any] | None, progress: Progress,
) -> MergedRecord:  # fmt: skip
    from deme_cli.merging.combine import merge_inputs

    num_bytes = sum(spec.num_bytes for spec in plan.inputs.base.tensors.values())
    return merge_inputs(
        plan.inputs, given, plan.output, method=plan.method, search=searched, report=document,
        advance=lambda done: progress(Step(done, num_bytes, "merging", "byte")),
    )  # fmt: skip


def _open_bench(plan: MergePlan, store: Path | None = None) -> tuple[Workbench, Evaluator]:
    """What opens objectives, and the network that takes each candidate's weights."""
    from deme_cli.merging.candidates import Evaluator
    from deme_cli.merging.objectives import FeatureStore, Workbench
    from deme_cli.merging.plan import find_measure

    kept = FeatureStore(store) if store else None
    bench = Workbench(find_measure(plan), plan.inputs.base_record, store=kept)
    evaluator = Evaluator(
        plan.inputs, plan.space(), method=plan.method, device=plan.device, dtype=plan.dtype,
        with_slopes=plan.settings.search == "gradient",
    )  # fmt: skip
    return bench, evaluator


def _search(plan: MergePlan, world: World, progress: Progress) -> MergeResult:
    """Run the trials that are left, and write the best; only one process of many does the end."""
    from deme_cli.merging.journal import Journal
    from deme_cli.merging.plan import find_measure
    from deme_cli.merging.search import conclude
    from deme_cli.training.examples import fill_caches

    search, path = plan.search(), journal_path(plan.output)
    progress(Step(note=_intention(plan, search, find_measure(plan).source)))
    progress(Step(label="loading the libraries, the network and the images"))
    store = path.with_name(f".{path.name}.features") if len(plan.stages) > 1 else None
    bench, evaluator = _open_bench(plan, store)
    if not all(stage.is_distance for stage in plan.stages):
        fill_caches(bench.examples, world=world, progress=progress)
    objectives = [
        bench.open(stage, plan.settings, experts=evaluator.ensemble) for stage in plan.stages
    ]
    evaluator.objectives = objectives
    _ = evaluator.network  # loaded now
    journal = Journal(path, search.space.labels, plan.describe(objectives))
    _run_trials(plan, search, journal, evaluator, world, progress)
    if not world.is_first:
        return MergeResult(plan.output, is_written=False)
    end = conclude(search, journal.trials(), objectives, evaluator.ranges)
    for text in end.warnings:
        console.warn(text)
    with StopRequests() as stop:

        def check(*done: int) -> None:
            if stop.asked:
                raise stop.stopped("stopped; all trials are kept, run the same command again")

        while (is_ours := journal.take_the_end()) is None:
            check()
            time.sleep(0.5)
        if is_ours or not plan.output.exists():
            record = _write_best(plan, search, journal, end, bench, evaluator, progress)
            journal.mark_merged(record.fingerprint)
        else:
            progress(Step(note=f"{plan.output} was written by another process of this search"))
    if bench.store and is_ours:
        bench.store.clear()
    return MergeResult(plan.output, show_search(path))


def _write_best(
    plan: MergePlan, search: Search, journal: Journal, end: Conclusion, bench: Workbench,
    evaluator: Evaluator, progress: Progress,
) -> MergedRecord:  # fmt: skip
    """The best candidate as a file, after its report."""
    from deme_cli.merging.report import MERGED, make_report
    from deme_cli.training.examples import fill_caches

    given, document = search.space.coefficients(end.best.point), None
    if plan.reports:
        fill_caches(bench.examples, progress=progress)
        merged = (MERGED, given.values, lambda: evaluator.at(given))
        soup = search.soup(journal.trials())
        document = make_report(plan, bench, evaluator, soup, merged, progress)
    return _write(plan, given, _record(plan, end, evaluator.objectives), document, progress)


def _intention(plan: MergePlan, search: Search, source: str) -> str:
    """What is minimised, and why one would."""
    is_default = plan.settings.objective == MergeConfig.objective
    return (
        f"search {search.method}, about {search.expected} trials, by "
        f"{plan.settings.objective}{' (the default)' if is_default else ''} on {source}: "
        f"{_REASONS[plan.stages[-1].name]}"
    )


def _run_trials(
    plan: MergePlan, search: Search, journal: Journal, evaluator: Evaluator, world: World,
    progress: Progress,
) -> None:  # fmt: skip
    """Evaluate the trials that are left, told as they come.

    Raises Stopped after a signal, Lost where another process of the launch has failed.
    """
    told, labels = set[int](), [one.label for one in evaluator.objectives]
    asked_at = time.monotonic()
    with StopRequests() as stop:

        def kept() -> str:
            done = sum(trial.is_done for trial in journal.trials())
            return (
                f"{done} trials are saved in {journal.path}; run the same command again to continue"
            )

        def check(*done: int) -> None:
            nonlocal asked_at
            if stop.asked:
                raise stop.stopped(kept())
            if time.monotonic() - asked_at >= _ASK_SECONDS:  # each question is a message
                asked_at = time.monotonic()
                if world.failure():
                    raise Lost(f"another process of this launch has ended; {kept()}")

        def tell() -> None:
            """Each new trial as a line, and the best so far."""
            done = [trial for trial in journal.trials() if trial.is_done]
            for trial in done:
                if trial.index not in told:
                    told.add(trial.index)
                    progress(Step(note=_line(search, trial, labels[trial.stage])))
            if done:
                stage = max(trial.stage for trial in done)
                best = min(trial.value for trial in done if trial.stage == stage)
                detail = f"best {labels[stage]} {best:#.5g}"
                progress(Step(len(done), search.expected, search.method, "trial", detail=detail))

        def between() -> None:
            check()
            if not world.is_alone:
                tell()  # also while this one waits for others

        evaluator.check = check
        if num_done := _open_journal(plan, journal, world):
            told.update(trial.index for trial in journal.trials() if trial.is_done)
            progress(Step(note=f"{journal.path}: continuing after {num_done} trials"))
        progress(Step(num_done, search.expected, search.method, "trial"))
        for _ in search.run(journal, evaluator, between):
            tell()
        tell()


def _open_journal(plan: MergePlan, journal: Journal, world: World) -> int:
    """How many trials are done. The first process opens it, and where it was asked to, empties it;
    and none ends the search before all have looked at its output."""
    world.require_same({"output": str(plan.output), **journal.search})
    world.wait()  # nothing is begun before all agree
    with world.first_before_others():
        return journal.open(force=plan.force and world.is_first)


def _line(search: Search, trial: Trial, label: str) -> str:
    """`trial 17/64: held-out loss 0.09312 at w 0.200 0.100 (1.2 s)`."""
    values = search.space.summary(trial.point)
    more = f" and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else ""
    w = " ".join(f"{value:.3f}" for value in values[:MOST_SHOWN]) + more
    value = f"{trial.value:#.5g}" if math.isfinite(trial.value) else "not finite"
    return (
        f"trial {trial.index + 1}/{search.expected}{f' ({trial.name})' if trial.name else ''}: "
        f"{label} {value} at {'mean w' if search.space.groups else 'w'} {w} ({trial.seconds:.1f} s)"
    )


def _record(plan: MergePlan, end: Conclusion, objectives: Sequence[Objective]) -> dict[str, Any]:
    """How the coefficients were found, as the merged file tells it."""
    grid, space, settings = plan.grid(), plan.space(), plan.settings
    return {
        "method": settings.search,
        **end.record,
        "grid": [list(values) for values in grid] if grid else None,
        "bounds": None if grid else [list(pair) for pair in space.bounds],
        "per": settings.per,
        "seed": settings.seed,
        "num": plan.stages[-1].num,
        "protocol": {**objectives[-1].protocol, "dtype": plan.dtype},
    }
