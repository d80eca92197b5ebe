"""What `deme merge --method regmean|fisher` does: run the experts over training images, solve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
from deme_cli.api.merge_order import Order, find_measure
from deme_cli.config import MergeConfig
from deme_cli.interrupts import StopRequests
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.lineage import Family
    from deme_cli.merging.methods.data_driven import MergedWeights
    from deme_cli.merging.search.measure import Measure
    from deme_cli.records import MergedRecord


def merge_from_data(order: Order, measure: Measure) -> MergedWeights:
    """The merged weights, in memory. Raises what the methods raise, and Stopped after a signal."""
    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.schedule import read_schedule
    from deme_cli.merging.methods.data_driven import DataProgress, MergedWeights
    from deme_cli.merging.methods.fisher import merge_fisher
    from deme_cli.merging.methods.range_draws import RangeDraws
    from deme_cli.merging.methods.regmean import merge_regmean
    from deme_cli.training.materials import name_companions, open_examples

    settings, record = order.settings, name_companions(order.family.base_record, measure.pipeline)
    companions = open_companions(
        record, pipeline=measure.pipeline, device=order.device, dtype=order.dtype
    )
    examples = open_examples(
        measure.images, companions, split="train", cache=measure.cache, beside=measure.beside
    )
    fill_with_bar(examples)
    draws = RangeDraws(
        examples, read_schedule(record.scheduler_config), settings.num, settings.batch_size,
        settings.seed,
    )  # fmt: skip
    given = order.given()
    merge = merge_regmean if settings.method == "regmean" else merge_fisher
    with StopRequests() as stop:

        def check() -> None:
            if stop.asked:
                raise stop.stopped("stopped; nothing was kept, run the same command again")

        steps = merge(
            order.family, draws, coefficients=given.values if given else None, check=check,
            device=order.device, dtype=order.dtype,
        )  # fmt: skip
        first = next(steps)
        assert isinstance(first, DataProgress), "it begins with how many images there are"
        with console.progress(settings.method, first.total, "image") as bar:
            bar.advance(first.done)
            for step in steps:
                if isinstance(step, MergedWeights):
                    return step
                bar.advance(step.done)
    raise AssertionError("a merge from data ends in weights")


def write_from_data(
    order: Order, measure: Measure, found: MergedWeights, report: dict[str, Any] | None
) -> MergedRecord:
    """Write weights that were computed from data, with everything that made them."""
    from deme_cli.merging.methods.data_driven import write_merged_weights

    settings, given = order.settings, order.given()
    count = len(order.family.parents)
    return write_merged_weights(
        order.family, found.weights, order.output,
        coefficients=given.values if given else [1 / count] * count, method=settings.method,
        settings={
            "num": settings.num, "batch_size": settings.batch_size, "seed": settings.seed,
            "dtype": order.dtype, "data": measure.source, **found.details,
        },
        report=report,
    )  # fmt: skip


def rebuild_from_data(
    run: RunFile, device: str, family: Family, record: MergedRecord, output: Path
) -> MergedRecord:
    """A merge from data as its record tells it, from the same images."""
    made = record.settings
    settings = run.settings(
        MergeConfig, method=record.method, coefficients=record.coefficients, num=made["num"],
        batch_size=made["batch_size"], seed=made["seed"], search="none", report=False,
    )  # fmt: skip
    order = Order(family, settings, {}, output, device, made["dtype"], True)
    measure = find_measure(run, order, None)
    if measure.source != made["data"]:
        measure = replace(measure, images=replace(measure.images, source=made["data"]))
    return write_from_data(order, measure, merge_from_data(order, measure), None)
