"""`merge`: one network of the base's size from the experts of its ranges (Eq. 8), and its `replay`.

A merge by known coefficients loads no torch. A search evaluates trials, which its journal keeps
(search.py, journal.py), takes the best, and reports on it with other seeds and images (report.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.artifacts import MergedRecord, fingerprint_file, read_record, record_of
from deme_cli.config import MergeConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.distributed import ALONE, Lost, World
from deme_cli.errors import ArtifactError, DemeError, MissingError, NumericsError
from deme_cli.files import read_header, require_output, write_whole
from deme_cli.jobs import StopRequests
from deme_cli.merging.coefficients import Coefficients, Point
from deme_cli.merging.journal import Journal, Trial
from deme_cli.merging.show_search import ShownSearch, journal_path, show_search
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.candidates import Workbench
    from deme_cli.merging.inputs import Inputs
    from deme_cli.merging.objectives import Objective
    from deme_cli.merging.plan import MergePlan
    from deme_cli.merging.search import Evaluate, Search

MERGED_NAME = "merged.safetensors"
MOST_SHOWN = 8  # coefficients named in a line about one trial
WORST_MISFIT = 0.1  # of a profile of an EMA, as a share of its norm
_CHUNK = 1 << 22  # bytes
_ASK_SECONDS = 1.0  # between two looks for a process of the launch that has failed


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
    pipeline: str | None = None, device: str = "auto", dtype: str = "fp32",
    save_dtype: str | None = None, force: bool = False, dry_run: bool = False, world: World = ALONE,
    progress: Progress = silent,
) -> MergeResult:  # fmt: skip
    """theta + sum_i w_i tau_i of experts or task vectors of one base, as one artifact (Eq. 8).

    settings: the coefficients (None: 1/N each), the method of combining, the search; those of `run`
    if None. Lists with a value for each expert are in the order of `experts` where you give them,
    in the order of the experts' ranges where `run.settings` takes them from its deme.toml.
    coefficients_for: other coefficients by glob of tensor names.
    ema_length: take `experts` as snapshots of one run and make the average of that length (EDM2).
    base: None for that of `run`, or the one beside the experts.   run: the settings of a deme.toml,
    of which a search reads images and sampling; the defaults without.   save_dtype: of the merged
    weights, None for that of the base.   dry_run: check, and say what would be done.   world:
    processes that share the trials of a search.

    A search chooses the coefficients on one set of seeds and images and, unless `settings.report`
    is False, reports them on another: `record.search`, `record.report`.

    Raises ConfigError, MissingError, ArtifactError, NumericsError; then no output appears. Raises
    Stopped after a signal; a search then goes on when it is called again.
    """
    from deme_cli.merging.plan import open_plan

    run = run or RunFile()
    plan = open_plan(
        experts, settings or run.settings(MergeConfig), run=run, output=output, force=force,
        base=base, fixed=coefficients_for, ema_length=ema_length, device=device, dtype=dtype,
        save_dtype=save_dtype, pipeline=run.pipeline(pipeline),
    )  # fmt: skip
    given = None if plan.searches else plan.coefficients
    count = len(experts)
    if dry_run:
        values = ", ".join(f"{w:g}" for w in (given.values if given else [1 / count] * count))
        what = f"method {plan.method.name}, coefficients {values}"
        if plan.searches:
            tried = f"the grid {plan.grid}" if plan.grid else plan.settings.search
            what = f"the best of {tried} by {plan.settings.objective} on {plan.images.source}"
        progress(Step(note=f"would merge {count} artifacts into {output}: {what}"))
        return MergeResult(output, is_written=False)
    if plan.searches:
        return _search(plan, world, progress)
    if given is None and plan.method.name != "model-stock":
        note = f"no coefficients given: 1/{count} each; --search grid looks for better ones"
        progress(Step(note=note))
    bench = None
    if plan.reports:
        from deme_cli.merging.candidates import Workbench

        bench = Workbench(plan)
    _write(plan, given, _origin(plan, given), bench, progress)
    return MergeResult(output)


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
    plan: MergePlan, given: Coefficients | None, origin: dict[str, Any] | None,
    bench: Workbench | None, progress: Progress, soup: Point | None = None,
) -> MergedRecord:  # fmt: skip
    """The merged file, after its report where there is to be one."""
    from deme_cli.merging.combine import merge_inputs

    document = None
    if bench is not None:
        from deme_cli.merging.report import make_report
        from deme_cli.training.examples import fill_caches

        fill_caches(bench.examples, progress=progress)
        document = make_report(bench, given, soup, progress)
    return merge_inputs(
        plan.inputs, given, plan.output, method=plan.method, search=origin, report=document,
        save_dtype=plan.save_dtype,
        advance=lambda done: progress(Step(done, plan.num_bytes, "merging", "byte")),
    )  # fmt: skip


def _search(plan: MergePlan, world: World, progress: Progress) -> MergeResult:
    """Run the trials that are left, and write the best; only one process of many does the end."""
    from deme_cli.merging.candidates import Workbench
    from deme_cli.training.examples import fill_caches

    search, path, settings = plan.search, journal_path(plan.output), plan.settings
    is_default = " (the default)" if settings.objective == MergeConfig.objective else ""
    progress(
        Step(note=f"search {search.method}, about {search.expected} trials, by "
                  f"{settings.objective}{is_default} on {plan.images.source}")
    )  # fmt: skip
    progress(Step(label="loading the libraries, the network and the images"))
    bench = Workbench(plan)
    if not all(stage.is_distance for stage in plan.stages):
        fill_caches(bench.examples, world=world, progress=progress)
    objectives = [bench.open(stage, settings) for stage in plan.stages]
    _ = bench.network  # loaded now
    journal = Journal(
        path, search.space.labels, plan.describe(objectives), force=plan.force and world.is_first
    )
    world.require_same({"output": str(plan.output), **journal.search})
    world.wait()  # nothing is begun before all agree
    with ExitStack() as opened:
        with world.first_before_others():  # where it was asked to, the first one empties it
            opened.enter_context(journal)
        stop = opened.enter_context(StopRequests())
        asked_at = time.monotonic()

        def kept() -> str:
            done = sum(trial.is_done for trial in journal.trials())
            return f"{done} trials are saved in {path}; run the same command again to continue"

        def check(*done: int) -> None:
            nonlocal asked_at
            if stop.asked:
                raise stop.stopped(kept())
            if time.monotonic() - asked_at >= _ASK_SECONDS:  # each question is a message
                asked_at = time.monotonic()
                if world.failure():
                    raise Lost(f"another process of this launch has ended; {kept()}")

        labels = [objective.name for objective in objectives]
        evaluate = bench.evaluator(objectives, check)
        _run_trials(search, journal, evaluate, labels, world, check, progress)
        asked_at = math.inf  # the others may be gone
        if not world.is_first:
            return MergeResult(plan.output, is_written=False)
        _end(bench, search, journal, objectives, check, progress)
    return MergeResult(plan.output, show_search(path))


def _end(
    bench: Workbench, search: Search, journal: Journal, objectives: Sequence[Objective],
    check: Callable[[], None], progress: Progress,
) -> None:  # fmt: skip
    """Write the best, unless another process of this search has."""
    from deme_cli.merging.search import conclude

    plan, space = bench.plan, search.space
    best, record, warnings = conclude(search, journal.trials(), [one.name for one in objectives])
    for text in warnings:
        console.warn(text)
    origin = {
        "method": search.method,
        **record,
        "grid": plan.grid and [list(values) for values in plan.grid],
        "bounds": None if plan.grid else [list(pair) for pair in space.bounds],
        "per": plan.settings.per,
        "seed": plan.settings.seed,
        "num": plan.stages[-1].num,
        "protocol": {**objectives[-1].protocol, "dtype": plan.dtype},
    }
    with journal.ending(check) as is_over:
        if is_over and plan.output.exists():
            progress(Step(note=f"{plan.output} was written by another process of this search"))
            return
        made = _write(
            plan, space.coefficients(best.point), origin, bench if plan.reports else None,
            progress, search.soup(journal.trials()),
        )  # fmt: skip
        journal.mark_merged(made.fingerprint)


def _run_trials(
    search: Search, journal: Journal, evaluate: Evaluate, labels: Sequence[str], world: World,
    check: Callable[[], None], progress: Progress,
) -> None:  # fmt: skip
    """Evaluate the trials that are left, told as they come: each as a line, and the best so far."""
    told = {trial.index for trial in journal.trials() if trial.is_done}
    if told:
        progress(Step(note=f"{journal.path}: continuing after {len(told)} trials"))
    progress(Step(len(told), search.expected, search.method, "trial"))

    def tell() -> None:
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

    for _ in search.run(journal, evaluate, between):
        tell()
    tell()


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


def replay(
    merged: Path, output: Path | None = None, *, experts: Sequence[Path] = (),
    base: Path | None = None, run: RunFile | None = None, force: bool = False,
) -> MergeResult:  # fmt: skip
    """Make the merged artifact `merged` again as its record tells it, bit for bit.

    Files are found by name and known by their fingerprint. The new file takes the header of the old
    one as it stands, and appears only if its weights have the fingerprint that the header tells.

    output: None for {merged}.replayed.safetensors.   experts, base: where they are now, if not
    where they were.   run: names the base, if not beside the merged file.

    Raises MissingError naming what is not found, ArtifactError naming a file that differs or a
    method that this deme has not, NumericsError where the result differs although base and experts
    do not. Then no output appears.
    """
    from deme_cli.merging.combine import merge_inputs
    from deme_cli.merging.inputs import find_base, open_experts, open_inputs
    from deme_cli.merging.methods import METHODS, USES, MethodSettings

    output = output or merged.with_name(f"{merged.stem}.replayed.safetensors")
    require_output(output, force=force)
    header = read_header(merged)
    record = record_of(header)
    if not isinstance(record, MergedRecord):
        raise ArtifactError(
            f"{merged}: expected an artifact of kind 'merged', found {record.kind!r}"
        )
    if record.method not in METHODS:
        raise ArtifactError(
            f"{merged}: was merged by method {record.method!r}, which this deme does not have "
            f"({', '.join(METHODS)}); use the file as it is, or the deme that wrote it "
            f"({record.created_by})"
        )
    opened = open_experts(
        [_find(merged, expert, experts) for expert in record.parents], "expert", "task-vector"
    )
    inputs = open_inputs(find_base(opened, run or RunFile(), base, merged.parent), opened)
    used = {k: v for k, v in record.settings.items() if k in USES.get(record.method, ())}
    finer = {glob: tuple(values) for glob, values in record.coefficients_for.items()}
    given = Coefficients(tuple(record.coefficients), finer)
    method = MethodSettings(record.method, **used)
    partial = output.with_name(f".{output.name}.replay")
    try:
        made = merge_inputs(
            inputs, None if method.name == "model-stock" else given, partial, method=method,
            like=header,
        ).fingerprint  # fmt: skip
        if made != record.fingerprint:
            raise _culprit(inputs, merged, record, made)
        write_whole(output, chain([_header_bytes(merged)], _tensors(partial)))
    finally:
        partial.unlink(missing_ok=True)
    return MergeResult(output)


def _find(merged: Path, expert: dict[str, Any], given: Sequence[Path]) -> Path:
    """The file of a recorded expert: given, at its recorded path, or beside the merged file."""
    path, wanted, others = Path(expert["path"]), expert["fingerprint"], []
    for place in (*given, path, merged.parent / path, merged.parent / path.name):
        if place.is_file():
            fingerprint = record_of(read_header(place)).fingerprint
            if fingerprint == wanted:
                return place
            if place.name == path.name:
                others.append(f"{place} ({fingerprint[:12]})")
    if others:
        raise ArtifactError(
            f"{', '.join(dict.fromkeys(others))}: not the expert that {merged} was made from, "
            f"{wanted[:12]}; give the right file"
        )
    raise MissingError(
        f"{expert['path']}: not found; {merged} was made from it (fingerprint {wanted[:12]}); "
        f"give its file"
    )


def _culprit(inputs: Inputs, merged: Path, record: MergedRecord, made: str) -> DemeError:
    """Why the result differs: a file whose weights are not those of its record, or the numbers."""
    for header in inputs.headers:
        found, told = fingerprint_file(header.path), record_of(header).fingerprint
        if found != told:
            return ArtifactError(
                f"{header.path}: its weights have the fingerprint {found[:12]}, its record says "
                f"{told[:12]}; copy or make the file again"
            )
    return NumericsError(
        f"{merged}: made again from the same files its weights have the fingerprint {made[:12]}, "
        f"its record says {record.fingerprint[:12]}; it was made otherwise than recorded"
    )


def _header_bytes(path: Path) -> bytes:
    """The length and the JSON before the tensors."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def _tensors(path: Path) -> Iterator[bytes]:
    """What is behind the header, in pieces."""
    with path.open("rb") as file:
        file.seek(len(_header_bytes(path)))
        yield from iter(lambda: file.read(_CHUNK), b"")
