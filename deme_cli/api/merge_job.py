"""A merge from files to a file, by coefficients given or searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.merge_order import Order, find_measure
from deme_cli.api.merge_report import RowToReport, report
from deme_cli.api.merge_settings import require_sense, searches
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.interrupts import StopRequests
from deme_cli.outputs import require_output, require_space
from deme_cli.processes import ALONE, World
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.coefficients import Coefficients
    from deme_cli.merging.search.evaluator import Evaluator
    from deme_cli.records import MergedRecord

_WORST_MISFIT = 0.1  # of a profile, as a share of its norm


@dataclass(frozen=True)
class MergeResult:
    """A merged artifact: its record has parents, coefficients, and what search and report found.

    files: the pictures and the journal of a search.
    """

    path: Path
    record: MergedRecord
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class MergeJob:
    """All that a merge is told. `fixed`: coefficients by glob; `by_range`: see Order."""

    run_file: RunFile
    settings: MergeConfig
    paths: Sequence[Path]
    fixed: Mapping[str, tuple[float, ...]]
    base: Path | None
    output: Path
    pipeline: str | None
    device: str
    dtype: str
    force: bool
    ema_length: float | None = None
    by_range: frozenset[str] = frozenset()
    world: World = ALONE  # who shares the trials of a search

    def open(self) -> Order:
        """The files behind the arguments, checked to belong together and to fit the settings."""
        from deme_cli.api.search_plan import open_plan
        from deme_cli.merging.coefficients import Coefficients
        from deme_cli.merging.lineage import find_base, open_family, open_parents
        from deme_cli.merging.methods.known import fit_coefficients

        require_sense(self.settings)
        require_output(self.output, force=self.force)
        opened = open_parents(self.paths, "expert", "task-vector")
        family = open_family(find_base(opened, self.run_file, self.base), opened)
        require_space(self.output, sum(spec.num_bytes for spec in family.base.tensors.values()))
        order = Order(
            family, self.settings, self.fixed, self.output, self.device, self.dtype, self.force,
            self.by_range,
        )  # fmt: skip
        if self.ema_length is not None and self.settings.method != "linear":
            raise ConfigError("--ema-length is a linear merge; use --method linear")
        if self.ema_length is not None and searches(self.settings):
            raise ConfigError("--ema-length makes the coefficients itself; add --search none")
        if searches(self.settings):
            open_plan(order, order.space())
        else:
            given = self._coefficients(order)
            fitted = fit_coefficients(family, given, order.method)
            assert isinstance(fitted, Coefficients)
        return order

    def say_what_would_run(self) -> None:
        """One line about what `run` would do, after all checks that need no torch."""
        order, settings = self.open(), self.settings
        if searches(settings):
            measure = find_measure(self.run_file, order, self.pipeline)
            what = f"the grid {order.grid()}" if order.search == "grid" else order.search
            plan = f"the best of {what} by {settings.objective} on {measure.source}"
        else:
            given = self._coefficients(order)
            values = given.values if given else [1 / len(self.paths)] * len(self.paths)
            plan = f"method {settings.method}, coefficients {', '.join(f'{w:g}' for w in values)}"
        console.note(f"would merge {len(self.paths)} artifacts into {self.output}: {plan}")

    def run(self) -> MergeResult | None:
        """Do it; None in the other processes of a launch, which only help with the trials.

        Raises Stopped after a signal; a search then goes on when it is run again.
        """
        order = self.open()
        if searches(self.settings):
            return self._searched(order)
        return self._given(order)

    def _coefficients(self, order: Order) -> Coefficients | None:
        """Those given, those of an EMA length, or none."""
        from deme_cli.merging.coefficients import Coefficients

        given = order.given()
        if self.ema_length is None:
            return given
        from deme_cli.merging.power_ema import coefficients_for_length

        if given is not None:
            raise ConfigError(
                "--ema-length makes the coefficients itself; leave out -w and --coefficients-for"
            )
        records = [parent.record for parent in order.family.parents]
        return Coefficients(tuple(coefficients_for_length(records, self.ema_length)))

    def _origin(self, order: Order, given: Coefficients | None) -> dict[str, Any] | None:
        """How the coefficients came about, where an EMA length made them; warns of a bad fit."""
        if self.ema_length is None or given is None:
            return None
        from deme_cli.merging.power_ema import misfit, snapshots_of

        snapshots = snapshots_of([parent.record for parent in order.family.parents])
        step = max(t for t, _ in snapshots)
        off = misfit(snapshots, given.values, step, self.ema_length)
        if off > _WORST_MISFIT:
            console.warn(
                f"these snapshots meet the profile of length {self.ema_length:g} only up to "
                f"{100 * off:.0f} %; save more of them, or ask for a length between theirs"
            )
        return {
            "method": "post-hoc EMA", "ema_length": self.ema_length, "step": step, "misfit": off,
            "best": None, "evaluations": 0,
        }  # fmt: skip

    def _given(self, order: Order) -> MergeResult:
        from deme_cli.merging.combine import merge_family

        given, count = self._coefficients(order), len(order.family.parents)
        if given is None and order.method.name != "model-stock":
            console.note(
                f"no coefficients given: 1/{count} each; --search grid looks for better ones"
            )
        document = None
        if order.reports:
            evaluator = self._evaluator(order)
            values = None if given is None else given.values
            merged = RowToReport(values, lambda: evaluator.denoiser(given))
            document = self._report(order, evaluator, merged)
        with _bar(order) as bar:
            record = merge_family(
                order.family, given, order.output, method=order.method,
                search=self._origin(order, given), report=document, advance=bar.advance,
            )  # fmt: skip
        return MergeResult(order.output, record)

    def _searched(self, order: Order) -> MergeResult | None:
        from deme_cli.api.search_end import finishing, search_coefficients
        from deme_cli.api.search_trials import help_search
        from deme_cli.artifacts import read_record
        from deme_cli.merging.combine import merge_family

        measure = find_measure(self.run_file, order, self.pipeline)
        if not self.world.is_first:
            help_search(order, measure, self.world)
            return None
        with (
            StopRequests() as stop,
            search_coefficients(order, measure, self.world) as found,
            finishing(found.journal, partial(_stop_if_asked, stop)) as is_ours,
        ):
            if not is_ours and order.output.exists():
                console.note(f"{order.output} was written by another process of this search")
                files = (*found.pictures, found.journal.path)
                return MergeResult(order.output, read_record(order.output, "merged"), files)
            document = None
            if order.reports:
                merged = RowToReport(
                    found.coefficients.values, lambda: found.evaluator.model(found.point)
                )
                document = report(order, found.workbench, found.evaluator, merged, found.soup)
            _stop_if_asked(stop)
            with _bar(order) as bar:
                record = merge_family(
                    order.family, found.coefficients, order.output, method=order.method,
                    search=found.record, report=document, advance=bar.advance,
                )  # fmt: skip
            found.journal.mark_merged(record.fingerprint)
            files = (*found.pictures, found.journal.path)
            return MergeResult(order.output, record, files)

    def _evaluator(self, order: Order) -> Evaluator:
        from deme_cli.merging.search.evaluator import Evaluator

        return Evaluator(
            order.family, order.space(), method=order.method,
            device=order.device, dtype=order.dtype,
        )  # fmt: skip

    def _report(self, order: Order, evaluator: Evaluator, merged: RowToReport) -> dict[str, Any]:
        from deme_cli.merging.search.objectives import Workbench

        measure = find_measure(self.run_file, order, self.pipeline)
        return report(order, Workbench(measure, order.family.base_record), evaluator, merged)


def _stop_if_asked(stop: StopRequests) -> None:
    if stop.asked:
        raise stop.stopped("stopped; all trials are kept, run the same command again")


def _bar(order: Order) -> Any:
    num_bytes = sum(spec.num_bytes for spec in order.family.base.tensors.values())
    return console.progress("merging", num_bytes, "byte")
