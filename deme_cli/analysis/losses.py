"""Where each model gained and where it lost: the denoising loss against the timestep.

[0, T) is divided into n buckets with as many draws (x_0, t, eps) each. Every model sees the same
draws, so the difference of two of them is paired draw by draw; the ensemble's error at a draw is
that of the expert whose range holds its timestep (Eq. 7), and costs no forward of its own.
The loss is that of the network's own target (eps, x_0, v or a velocity).
m draws in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deme_cli.analysis.figure import (
    BASE,
    EDGE,
    ENSEMBLE,
    MERGED,
    OTHER,
    color_of,
    open_axis,
    render,
    shorten,
)
from deme_cli.analysis.result import (
    Analysis,
    Kept,
    check_inputs,
    keeping,
    ranges_of,
    write_analysis,
)
from deme_cli.analysis.settings import LossConfig, bucket_ranges
from deme_cli.config import DataConfig
from deme_cli.console import Progress, Step, plain, signed, silent
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, parse_span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from deme_cli.diffusion.denoiser import Denoiser
    from deme_cli.training.batches import FixedDraws

_BATCHES = 8  # that are kept as one
_NAME = 18  # characters of a model's name in the picture
_NEAR = 5.0  # per cent up to which the axis of changes is linear, beyond it logarithmic
_FAR = 1.5  # of what is followed, where that axis ends
_TICKS = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000])
Row = dict[str, Any]


def analyze_losses(
    models: Sequence[str | Path] = (), settings: LossConfig | None = None, *,
    images: DataConfig | None = None, split: str = "held-out", num_ranges: int | None = None,
    output: Path = Path("losses.json"), run: RunFile | None = None, pipeline: str | None = None,
    device: str = "auto", dtype: str = "fp32", force: bool = False, dry_run: bool = False,
    progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure the denoising loss of each model against the timestep, all on the same draws.

    models: artifacts, diffusers folders or hub ids; the others are compared with the first, experts
    that cover all timesteps also act together. None: base, experts and merged of the run's folder.
    images: those of `run` if None.   split: train or held-out.   num_ranges: equal ranges to sum up
    over; None for those of `run` or of the experts.   progress: is told how far it is.

    Writes `output` and the picture beside it, .png. With `dry_run` all is checked and told, and
    nothing is measured. Raises ConfigError, MissingError or ArtifactError before anything is
    measured, NumericsError, Stopped after a signal; then what was measured is kept.
    """
    run, settings = run or RunFile(), settings or LossConfig()
    images = check_inputs(output, images, run, split=split, force=force)
    opened = _open_models(
        list(map(str, models)), run, pipeline=run.pipeline(pipeline), device=device, dtype=dtype
    )
    records = [record for model in opened for record in model.records.values()]
    record, names = records[0], ", ".join(model.name for model in opened)
    buckets = bucket_ranges(settings.buckets, record.num_train_timesteps)
    ranges = ranges_of(run, records, num_ranges, record.num_train_timesteps)
    total = settings.buckets * settings.num
    progress(Step(note=f"{names}: {total:,} draws each from {images.source} ({split})"))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import INTERVALS, draws_in, open_images, spread_draws
    from deme_cli.diffusion.schedule import read_schedule

    examples, data, seen = open_images(
        record, images, split, run=run, output=output, pipeline=pipeline, device=device,
        progress=progress,
    )  # fmt: skip
    schedule = read_schedule(record.scheduler_config)
    draws = spread_draws(examples, schedule, buckets, settings)
    inside, clusters = draws_in(draws, ranges), draws.images.numpy()
    protocol = {
        "models": {one.name: [r.fingerprint for r in one.records.values()] for one in opened},
        "data": data, "images": len(np.unique(clusters)), **asdict(settings),
        "dtype": dtype, "intervals": INTERVALS,
    }  # fmt: skip
    total *= sum(model.load is not None for model in opened)
    with keeping(
        output, {**protocol, **seen}, "losses", "draw", total, progress=progress, force=force
    ) as kept:
        errors = _measure(opened, draws, kept)
        rows = _rows(opened, errors, inside, clusters, settings.num)
        foot = f"{settings.num} draws per bucket from {protocol['images']} images of "
        foot += f"{examples.source} ({split}), the same for all"
        document = {
            "reading": _headline(rows), "protocol": protocol, "ranges": list(map(str, ranges)),
            "buckets": list(map(str, buckets)), "models": rows,
        }  # fmt: skip
        return write_analysis(
            output, "losses", document, draw_losses(rows, buckets, ranges, foot=foot),
            shown=["models"], columns=["model", "loss", "change, %", *map(str, ranges)],
            rows=_table(rows),
        )  # fmt: skip


class _Model(NamedTuple):
    """kind: base, expert, ensemble, merged or model. An ensemble has the records of its experts,
    whose own rows come before it; the others have one, and are loaded when they are measured."""

    name: str
    kind: str
    records: Mapping[str, Any]
    load: Callable[[], Denoiser] | None


def _open_models(
    arguments: Sequence[str], run: RunFile, *, pipeline: str | None, device: str, dtype: str
) -> list[_Model]:
    """A model per argument in the order given; experts that make an ensemble, and then it."""
    from deme_cli.analysis.draws import require_alike
    from deme_cli.evaluation.rows import ENSEMBLE, folder_models, plan_rows
    from deme_cli.sampling.ensemble import open_single, read_ensemble

    if not (arguments := arguments or folder_models(run.base)):
        raise MissingError(
            f"no models in {run.base.parent.resolve()}: no {run.base.name}, no ft_*.safetensors, "
            f"no merged.safetensors; name models, or make a base with `deme split`"
        )
    models: list[_Model] = []
    for plan in plan_rows(arguments)[0]:
        if plan.kind == "samples":
            raise ArtifactError(f"{plan.arguments[0]}: images, not a model; give models")
        own = {plan.name: plan.arguments[0]}
        if plan.kind == ENSEMBLE:
            members = read_ensemble([Path(argument).expanduser() for argument in plan.arguments])
            own = {member.path.stem: str(member.path) for member in members}
        for name, argument in own.items():
            experts, record = open_single(
                argument, run=run, pipeline=pipeline, device=device, dtype=dtype
            )
            models.append(_Model(name, record.kind, {name: record}, experts[0].load))
        if plan.kind == ENSEMBLE:
            records = {member.path.stem: member.record for member in members}
            models.append(_Model(plan.name, ENSEMBLE, records, None))
    names = [model.name for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two models are called {twice}; give their files names of their own")
    require_alike([named for model in models for named in model.records.items()])
    return models


def _measure(models: Sequence[_Model], draws: FixedDraws, kept: Kept) -> dict[str, np.ndarray]:
    """The error of each model at every draw (m,), by name."""
    import torch

    from deme_cli.analysis.draws import draws_in

    def measured(name: str, load: Callable[[], Denoiser], chosen: torch.Tensor) -> Row:
        values = draws.errors(load().network, chosen=chosen, check=kept.check).numpy()
        if not np.isfinite(values).all():
            raise NumericsError(f"{name}: the loss is not finite; the model's weights are broken")
        return {"errors": values}

    errors: dict[str, np.ndarray] = {}
    parts = torch.arange(len(draws.t)).split(draws.batch_size * _BATCHES)
    for name, _, records, load in models:
        if load is None:  # at each draw the error of its expert
            owned = draws_in(draws, [record.timesteps for record in records.values()])
            errors[name] = np.select([*owned], [errors[expert] for expert in records])
            continue
        measure = functools.partial(measured, name, functools.cache(load))
        errors[name] = np.concatenate([
            kept.unit(f"{name} {i}", len(one), functools.partial(measure, one))["errors"]
            for i, one in enumerate(parts)
        ])  # fmt: skip
    return errors


def _rows(
    models: Sequence[_Model], errors: dict[str, np.ndarray], inside: np.ndarray,
    images: np.ndarray, num: int,
) -> list[Row]:  # fmt: skip
    """What is known of each model, lists by bucket; the first is what the others differ from."""
    from deme_cli.analysis.draws import estimate
    from deme_cli.evaluation.rows import is_partial

    def by_bucket(values: np.ndarray) -> tuple[Any, ...]:
        pairs = zip(values.reshape(-1, num), images.reshape(-1, num), strict=True)
        return tuple(zip(*(estimate(*pair) for pair in pairs), strict=True))

    rows, first = [], models[0].name
    for name, kind, records, load in models:
        record, own = next(iter(records.values())), errors[name]
        means, halves = by_bucket(own)
        row: Row = {
            "name": name, "kind": kind,
            "range": str(record.timesteps) if load and is_partial(record) else None,
            "loss": float(own.mean()), "loss_by_range": [float(own[m].mean()) for m in inside],
            "losses": means, "halves": halves,
        }  # fmt: skip
        if name != first:
            paired = own - errors[first]
            means, halves = by_bucket(paired)
            by_range = [estimate(paired[mine], images[mine])._asdict() for mine in inside]
            row |= {
                "minus": first, "difference": estimate(paired, images)._asdict(),
                "difference_by_range": by_range, "differences": means, "difference_halves": halves,
            }  # fmt: skip
        rows.append(row)
    return rows


def relative_changes(first: Row, row: Row) -> list[tuple[float, float]]:
    """Change and half-width in per cent of the first model's loss: all timesteps, then by range."""
    estimates = [row["difference"], *row["difference_by_range"]]
    pairs = zip(estimates, (first["loss"], *first["loss_by_range"]), strict=True)
    return [(one["mean"] * (100 / loss), one["half"] * (100 / loss)) for one, loss in pairs]


def change_text(mean: float, half: float, sign: str = " ± ") -> str:
    return f"{signed(mean, 1)}{sign}{half:.1f}" if half == half else signed(mean, 1)


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """Without blanks around ±: four ranges and their headings fit into 80 columns."""
    first, *others = rows
    blank = [""] * len(first["loss_by_range"])
    lines = [[first["name"], plain(first["loss"]), "", *blank]]
    for row in others:
        told = [change_text(*pair, sign="±") for pair in relative_changes(first, row)]
        lines.append([row["name"], plain(row["loss"]), *told])
    return lines


def _headline(rows: Sequence[Row]) -> str:
    first, *others = rows
    if not others:
        return f"the loss of {first['name']} is {plain(first['loss'])} over all timesteps"
    shown = [row for row in others if row["range"] is None] or others
    told = [f"{row['name']} {change_text(*relative_changes(first, row)[0])} %" for row in shown]
    return f"loss over all timesteps against {first['name']}: {', '.join(told)}"


def draw_losses(
    rows: Sequence[Row], buckets: Sequence[TimestepRange], ranges: Sequence[TimestepRange],
    *, foot: str,
) -> bytes:  # fmt: skip
    """On top the change in per cent against the timestep, with 95 % intervals for the models of all
    timesteps; an expert is drawn strong in its own range and thin outside it, where the axis does
    not follow it. Below, the losses themselves."""
    edges = np.array([0, *(bucket.stop for bucket in buckets)])
    middles = (edges[:-1] + edges[1:]) / 2
    spans = [parse_span(row["range"] or f"0:{edges[-1]}", "range") for row in rows]
    inside = [(edges[1:] > span.start) & (edges[:-1] < span.stop) for span in spans]
    styles = _styles(rows)

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
        _draw_changes(upper, rows, middles, inside, styles)
        for row, mine, style in zip(rows, inside, styles, strict=True):
            lower.plot(middles, np.where(mine, row["losses"], np.nan), **style)
        lower.set(yscale="log", xlim=(0, edges[-1]), xlabel="timestep t (0 = clean)")
        lower.set_ylabel("mean squared error")
        lower.set_title("Denoising loss, experts in their ranges", fontsize=10, loc="left")
        for axis in (upper, lower):
            open_axis(axis)
            for span in ranges[1:]:
                axis.axvline(span.start, **EDGE)
        handles, labels = lower.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)

    return render(
        draw, size=(10, 6.6), title="Where each model gained, and where it lost",
        foot=f"{foot}; bands: 95 %, pointwise, over images",
    )  # fmt: skip


def _styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    usual: dict[str, Any] = {"color": OTHER, "linewidth": 1.6, "linestyle": (0, (5, 1, 1, 1))}
    by_kind: dict[str, Any] = {
        "ensemble": {"color": ENSEMBLE, "linewidth": 1.0, "zorder": 3},  # on its experts' lines
        "merged": {"color": MERGED, "linewidth": 1.6, "zorder": 3},
    }
    styles, place = [], 0
    for index, row in enumerate(rows):
        style, label = by_kind.get(row["kind"], usual), shorten(row["name"], _NAME)
        if row["range"] is not None:
            label += f", {row['range']}"
            dashes = "-" if place < 6 else (0, (4, 1.5))
            style = {"color": color_of(place), "linewidth": 3.2, "linestyle": dashes}
            place += 1
        if index == 0:
            style = {"color": BASE, "linewidth": 2.2}
        styles.append({**style, "label": label})
    return styles


def _draw_changes(
    axis: Axes, rows: Sequence[Row], middles: np.ndarray, inside: Sequence[np.ndarray],
    styles: Sequence[dict[str, Any]],
) -> None:  # fmt: skip
    from matplotlib.ticker import NullLocator

    first, reach = rows[0], [0.0]
    scale = 100 / np.array(first["losses"])
    axis.axhline(0, **styles[0])
    for row, mine, style in zip(rows[1:], inside[1:], styles[1:], strict=True):
        change = np.array(row["differences"]) * scale
        half = np.array(row["difference_halves"]) * scale
        reach += change[mine & np.isfinite(change)].tolist()
        color = style["color"]
        if row["range"] is None:
            axis.fill_between(middles, change - half, change + half, color=color, alpha=0.16, lw=0)
        else:
            axis.plot(middles, change, color=color, linewidth=0.7, alpha=0.7)
        axis.plot(middles, np.where(mine, change, np.nan), **style)
    low, high = min(reach) * _FAR - 1, max(reach) * _FAR + 1
    axis.set_yscale("symlog", linthresh=_NEAR, linscale=1.2)
    ticks = np.concatenate([-_TICKS[::-1], [0], _TICKS])
    ticks = ticks[(low <= ticks) & (ticks <= high)]
    axis.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks], fontsize=8)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set(ylim=(low, high), ylabel=f"loss against {shorten(first['name'], _NAME)}, %")
    title = "Change of the denoising loss (below 0 is better; logarithmic beyond 5 %)"
    axis.set_title(title, fontsize=10, loc="left")
