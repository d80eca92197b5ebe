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
from functools import cached_property, partial
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
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.journal import Journal
from deme_cli.merging.show_search import ShownSearch, journal_path, show_search
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.candidates import Workbench
    from deme_cli.merging.inputs import Inputs
    from deme_cli.merging.plan import MergePlan
    from deme_cli.merging.search import Search
    from deme_cli.training.batches import Check

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
    given, search, count = plan.given, plan.search, len(experts)
    if dry_run:
        values = ", ".join(f"{w:g}" for w in (given.values if given else [1 / count] * count))
        what = f"method {plan.method.name}, coefficients {values}"
        if search:
            tried = f"the grid {search.grid}" if search.grid else search.method
            what = f"the best of {tried} by {plan.settings.objective} on {plan.images.source}"
        progress(Step(note=f"would merge {count} artifacts into {output}: {what}"))
        return MergeResult(output, is_written=False)
    if search:
        return _search(plan, search, world, progress)
    if given is None and plan.method.name != "model-stock":
        note = f"no coefficients given: 1/{count} each; --search grid looks for better ones"
        progress(Step(note=note))
    bench = None
    if plan.reports:
        from deme_cli.merging.candidates import Workbench

        bench = Workbench(plan)
    origin = None
    if ema_length is not None and given is not None:
        from deme_cli.merging.power_ema import misfit, snapshots_of

        snapshots = snapshots_of([expert.record for expert in plan.inputs.experts])
        step = max(t for t, _ in snapshots)
        off = misfit(snapshots, given.values, step, ema_length)
        if off > WORST_MISFIT:
            console.warn(
                f"these snapshots meet the profile of length {ema_length:g} only up to "
                f"{100 * off:.0f} %; save more of them, or ask for a length between theirs"
            )
        origin = {
            "method": "post-hoc EMA", "ema_length": ema_length, "step": step, "misfit": off,
            "best": None, "evaluations": 0,
        }  # fmt: skip
    _write(plan, given, origin, bench, progress)
    return MergeResult(output)


def _write(
    plan: MergePlan, given: Coefficients | None, origin: dict[str, Any] | None,
    bench: Workbench | None, progress: Progress,
) -> MergedRecord:  # fmt: skip
    """The merged file, after its report where there is to be one."""
    from deme_cli.merging.combine import merge_inputs

    document = None
    if bench is not None:
        from deme_cli.merging.report import make_report
        from deme_cli.training.examples import fill_caches

        fill_caches(bench.examples, progress=progress)
        document = make_report(bench, given, progress)
    return merge_inputs(
        plan.inputs, given, plan.output, method=plan.method, search=origin, report=document,
        save_dtype=plan.save_dtype, lora=plan.settings.lora,
        advance=lambda done: progress(Step(done, plan.num_bytes, "merging", "byte")),
    )  # fmt: skip


def _search(plan: MergePlan, search: Search, world: World, progress: Progress) -> MergeResult:
    """Run the trials that are left, and write the best; only one process of many does the end."""
    from deme_cli.merging.candidates import Workbench
    from deme_cli.merging.search import conclude
    from deme_cli.training.examples import fill_caches

    path, settings = journal_path(plan.output), plan.settings
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
    bench.network()  # loaded now
    protocols = [{**one.protocol, "dtype": plan.dtype} for one in objectives]
    what = _decides(plan, search, protocols)
    journal = Journal(path, search.space.labels, what, force=plan.force and world.is_first)
    world.require_same({"output": str(plan.output), **journal.search})
    world.wait()  # nothing is begun before all agree
    with ExitStack() as opened:
        with world.first_before_others():  # where it was asked to, the first one empties it
            opened.enter_context(journal)
        stop = opened.enter_context(StopRequests())
        names = [one.name for one in objectives]
        tell = _teller(search, journal, names, progress)
        check = _checker(stop, journal, world)
        evaluate = partial(bench.evaluate, objectives, check)
        search.run(journal, evaluate, lambda: tell(check))
        if not world.is_first:
            return MergeResult(plan.output, is_written=False)
        best, record, warnings = conclude(search, journal.trials(), names)
        for text in warnings:
            console.warn(text)
        with journal.ending(_checker(stop, journal, ALONE)) as is_over:  # others may be gone
            if is_over and plan.output.exists():
                note = f"{plan.output} was written by another process of this search"
                progress(Step(note=note))
            else:
                given, measures = search.space.coefficients(best.point), plan.reports
                origin = {
                    "method": search.method, **record, "grid": search.grid,
                    "bounds": None if search.grid else search.space.bounds, "per": settings.per,
                    "seed": settings.seed, "num": plan.stages[-1].num, "protocol": protocols[-1],
                }  # fmt: skip
                made = _write(plan, given, origin, bench if measures else None, progress)
                journal.mark_merged(made.fingerprint)
    return MergeResult(plan.output, show_search(path))


def _decides(plan: MergePlan, search: Search, protocols: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the trials depend on; budgets are left out."""
    space, base = search.space, plan.inputs.base_record
    return {
        "method": search.method,
        "parents": [expert.record.fingerprint for expert in plan.inputs.experts],
        "base": base.fingerprint,
        "combination": {"name": plan.method.name, **plan.method.used},
        "groups": list(space.all_groups),
        "fixed": {glob: list(w) for glob, w in space.fixed.items()},
        "grid": search.grid,
        "bounds": None if search.grid else space.bounds,
        "start": list(space.start),
        "seed": plan.settings.seed,
        "objectives": protocols,
        "keep": [stage.keep for stage in plan.stages[:-1]],
    }


def _checker(stop: StopRequests, journal: Journal, world: World) -> Check:
    """What raises where the search is to stop, and says what is kept of it."""
    asked_at = time.monotonic()

    def check(*done: int) -> None:
        nonlocal asked_at
        is_lost = 0
        if time.monotonic() - asked_at >= _ASK_SECONDS:  # each question is a message
            asked_at, is_lost = time.monotonic(), world.failure()
        if stop.asked or is_lost:
            kept = (
                f"{sum(trial.is_done for trial in journal.trials())} trials are saved in "
                f"{journal.path}; run the same command again to continue"
            )
            if stop.asked:
                raise stop.stopped(kept)
            raise Lost(f"another process of this launch has ended; {kept}")

    return check


def _teller(
    search: Search, journal: Journal, labels: Sequence[str], progress: Progress
) -> Callable[[Check], None]:
    """What tells of the trials as they come, whoever makes them, and then checks: each as a line,
    as `trial 17/64: loss 0.09312 at w 0.200 0.100 (1.2 s)`, and the best so far."""
    told = {trial.index for trial in journal.trials() if trial.is_done}
    if told:
        progress(Step(note=f"{journal.path}: continuing after {len(told)} trials"))
    progress(Step(len(told), search.expected, search.method, "trial"))

    def tell(check: Check) -> None:
        done = [trial for trial in journal.trials() if trial.is_done]
        for trial in [trial for trial in done if trial.index not in told]:
            told.add(trial.index)
            values = search.space.summary(trial.point)
            w = " ".join(f"{value:.3f}" for value in values[:MOST_SHOWN])
            more = f" and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else ""
            value = f"{trial.value:#.5g}" if math.isfinite(trial.value) else "not finite"
            name = f" ({trial.name})" if trial.name else ""
            progress(Step(note=(
                f"trial {trial.index + 1}/{search.expected}{name}: {labels[trial.stage]} {value} "
                f"at {'mean w' if search.space.groups else 'w'} {w}{more} ({trial.seconds:.1f} s)"
            )))  # fmt: skip
        if done:
            stage = max(trial.stage for trial in done)
            best = min(trial.value for trial in done if trial.stage == stage)
            detail = f"best {labels[stage]} {best:#.5g}"
            progress(Step(len(done), search.expected, search.method, "trial", detail=detail))
        check()

    return tell


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
    require_output(output, force=force, inputs=[*experts, *filter(None, [base])])
    header = read_header(merged)
    record: MergedRecord = record_of(header, "merged")
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
            like=header, lora=(record.adapter or {}).get("rank"),
        ).fingerprint  # fmt: skip
        if made != record.fingerprint:
            raise _culprit(inputs, merged, record, made)
        write_whole(output, _joined(merged, partial))
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


def _joined(merged: Path, made: Path) -> Iterator[bytes]:
    """The header of one file and the tensors of another, in pieces."""
    with merged.open("rb") as old, made.open("rb") as new:
        length = old.read(8)
        yield length + old.read(int.from_bytes(length, "little"))
        new.seek(8 + int.from_bytes(new.read(8), "little"))
        yield from iter(lambda: new.read(_CHUNK), b"")
