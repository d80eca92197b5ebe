"""Where each model gained and where it lost: the denoising loss against the timestep.

[0, T) is divided into n buckets with as many draws (x_0, t, eps) each. Every model sees the same
draws, so the difference of two of them is paired draw by draw; the ensemble's error at a draw is
that of the expert whose range holds its timestep (Eq. 7), and costs no forward of its own.
The loss is that of the network's own target (eps, x_0, v or a velocity).
k models, m draws in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import (
    BASE,
    DIVERGING,
    ENSEMBLE,
    LINE,
    MERGED,
    OTHER,
    color_of,
    open_axis,
    render,
    shorten,
)
from deme_cli.analysis.result import (
    Analysis,
    Unfinished,
    check_images,
    check_output,
    document_bytes,
    write_analysis,
)
from deme_cli.analysis.settings import LossConfig, bucket_ranges
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.console import Progress, Step, plain, signed, silent
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, require_cover, route, split_uniform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from deme_cli.analysis.models import Model
    from deme_cli.training.batches import FixedDraws

_BATCHES = 8  # between two looks at the clock
_NAME = 18  # characters of a model's name in the picture
_NEAR = 5.0  # per cent up to which the axis of changes is linear, beyond it logarithmic
_FAR = 1.5  # of what is followed, where that axis ends
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
Ranges = Sequence[TimestepRange]


def analyze_losses(
    models: Sequence[str | Path] = (),
    settings: LossConfig | None = None,
    *,
    images: DataConfig | None = None,
    split: str = "held-out",
    num_ranges: int | None = None,
    output: Path = Path("losses.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure the denoising loss of each model against the timestep, all on the same draws.

    models: artifacts, diffusers folders or hub ids; the others are compared with the first, experts
    that cover all timesteps also act together. None: base, experts and merged of the run's folder.
    images: those of `run` if None.   split: train or held-out.   num_ranges: equal ranges to sum up
    over; None for those of the experts, else of `run`.   progress: is told how far it is.

    Writes `output` and the pictures beside it, .png and .svg. With `dry_run` all is checked and
    told, and nothing is measured. Raises ConfigError, MissingError or ArtifactError before anything
    is measured, NumericsError, Stopped after a signal; then what was measured is kept.
    """
    run, settings = run or RunFile(), settings or LossConfig()
    check_output(output, force=force)
    images = check_images(images, run, split=split)

    from deme_cli.analysis.models import folder_models, open_models

    named = [str(model) for model in models] or folder_models(run.base)
    opened = open_models(named, pipeline=run.pipeline(pipeline), device=device, dtype=dtype)
    record, whole = opened[0].records[0], opened[0].records[0].num_train_timesteps
    buckets = bucket_ranges(settings.buckets, whole)
    ranges = _ranges(run, opened, num_ranges, whole)
    progress(Step(note=(
        f"{', '.join(model.name for model in opened)}: {settings.buckets * settings.num:,} draws "
        f"each from {images.source} ({split})"
    )))  # fmt: skip
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import INTERVALS, identity_of, open_images, spread_draws
    from deme_cli.diffusion.schedule import read_schedule

    record, examples = open_images(
        record, images, run, split=split, model="", output=output, pipeline=pipeline,
        device=device, progress=progress,
    )  # fmt: skip
    draws = spread_draws(
        examples, read_schedule(record.scheduler_config), buckets, settings.num,
        seed=settings.seed, purpose="losses", batch_size=settings.batch_size,
    )  # fmt: skip
    times = draws.schedule.times(draws.t).tolist()
    _require_draws(ranges, times, whole)
    identity = {
        "models": [model.fingerprints for model in opened], **identity_of(record, examples),
        "split": split, "buckets": settings.buckets, "num": settings.num,
        "batch size": settings.batch_size, "seed": settings.seed, "dtype": dtype,
    }  # fmt: skip
    with Unfinished(output, identity, force=force) as kept:
        errors = _measure(opened, draws, kept, progress)
        clusters = draws.images.numpy()
        rows = _rows(opened, errors, ranges, times, clusters, settings.num)
        num_images = len(np.unique(clusters))
        protocol = {
            "models": {model.name: model.fingerprints for model in opened},
            "data": {"source": examples.source, "fingerprint": examples.fingerprint,
                     "split": split},
            "images": num_images, "buckets": settings.buckets, "num": settings.num,
            "seed": settings.seed, "dtype": dtype, "intervals": INTERVALS,
        }  # fmt: skip
        document = {
            "reading": _headline(rows), "protocol": protocol, "ranges": list(map(str, ranges)),
            "buckets": list(map(str, buckets)), "models": rows,
        }  # fmt: skip
        foot = f"{settings.num} draws per bucket from {num_images} images of {examples.source}"
        drawn = draw_losses(rows, buckets, ranges, foot=f"{foot} ({split}), the same for all")
        return write_analysis(
            kept, drawn, document_bytes("losses", document), shown=("reading", "models"),
            columns=["model", "loss", "change, %", *(f"in {span}" for span in ranges)],
            rows=_table(rows),
        )  # fmt: skip


def _ranges(
    run: RunFile, models: Sequence[Model], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """`n` equal ranges, else the first ensemble's, else those of deme.toml.

    Raises ConfigError where those of deme.toml are of another number of timesteps.
    """
    if n is not None:
        return split_uniform(n, num_train_timesteps)
    for model in models:
        if model.members:
            return [expert.range for expert in model.experts]
    split = run.settings(SplitConfig)
    ranges = split.timestep_ranges
    if ranges and (stop := max(span.stop for span in ranges)) != num_train_timesteps:
        raise ConfigError(
            f"[split] ranges: they end at {stop}, but this model has {num_train_timesteps} "
            f"timesteps; correct deme.toml, or give -n"
        )
    return ranges or split_uniform(split.n, num_train_timesteps)


def _require_draws(ranges: Ranges, times: Sequence[float], num_train_timesteps: int) -> None:
    """Check that the ranges cover [0, T) once and that draws lie in each of them."""
    require_cover(ranges, num_train_timesteps)
    owners = owners_of(times, ranges)
    for index, span in enumerate(ranges):
        if index not in owners:
            raise ConfigError(f"no draw lies in range {span}; choose more --buckets or --num")


def owners_of(times: Sequence[float], ranges: Ranges) -> np.ndarray:
    """Which range each time lies in: (m,)."""
    return np.array([route(t, ranges) for t in times])


def _measure(
    models: Sequence[Model], draws: FixedDraws, kept: Unfinished, progress: Progress
) -> dict[str, np.ndarray]:
    """The error (m,) of each model that is one network; what is kept is not measured again."""
    import torch

    alone, total = [model for model in models if not model.members], len(draws.t)
    size = draws.batch_size * _BATCHES
    errors = kept.arrays.setdefault("errors", np.full((len(alone), total), np.nan))
    done = int(np.isfinite(errors).sum())
    note = "continuing with what was measured before" if done else kept.note
    progress(Step(done, errors.size, "losses", "draw", note))
    for model, row in zip(alone, errors, strict=True):
        first = int(np.isfinite(row).sum())
        if first == total:
            continue
        network = model.experts[0].load().network
        for start in range(first, total, size):
            check = kept.checker(f"{done} of {errors.size} draws")
            chosen = torch.arange(start, min(start + size, total))
            found = draws.errors(network, chosen=chosen, check=check).numpy()
            if not np.isfinite(found).all():
                raise NumericsError(
                    f"{model.name}: the loss is not finite; the model's weights are broken"
                )
            row[start : start + len(chosen)] = found
            done += len(chosen)
            progress(Step(done, errors.size, "losses", "draw"))
    by_name = {model.name: row for model, row in zip(alone, errors, strict=True)}
    times = draws.schedule.times(draws.t).tolist()
    for model in models:
        if model.members:  # at each draw the error of its expert
            owners = owners_of(times, [expert.range for expert in model.experts])
            by_name[model.name] = np.array([by_name[name] for name in model.members])[
                owners, np.arange(total)
            ]
    return by_name


def _rows(
    models: Sequence[Model], errors: dict[str, np.ndarray], ranges: Ranges,
    times: Sequence[float], images: np.ndarray, num: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """What is known of each model, lists by bucket; the first is what the others differ from."""
    from deme_cli.analysis.draws import Estimate, estimate

    first = models[0].name
    inside = [owners_of(times, ranges) == i for i in range(len(ranges))]

    def by_bucket(values: np.ndarray) -> list[Estimate]:
        pairs = zip(values.reshape(-1, num), images.reshape(-1, num), strict=True)
        return [estimate(*pair) for pair in pairs]

    rows = []
    for model in models:
        own = errors[model.name]
        losses = by_bucket(own)
        row: dict[str, Any] = {
            "name": model.name, "kind": model.kind,
            "range": None if model.span is None else str(model.span), "loss": float(own.mean()),
            "loss_by_range": [float(own[mine].mean()) for mine in inside],
            "losses": [one.mean for one in losses], "halves": [one.half for one in losses],
        }  # fmt: skip
        if model.name != first:
            paired = own - errors[first]
            differences = by_bucket(paired)
            by_range = [asdict(estimate(paired[mine], images[mine])) for mine in inside]
            row |= {
                "minus": first, "difference": asdict(estimate(paired, images)),
                "difference_by_range": by_range,
                "differences": [one.mean for one in differences],
                "difference_halves": [one.half for one in differences],
            }  # fmt: skip
        rows.append(row)
    return rows


def _changes(first: dict[str, Any], row: dict[str, Any]) -> list[tuple[float, float]]:
    """Change and half-width in per cent of the first model's loss: all timesteps, then by range."""
    estimates = [row["difference"], *row["difference_by_range"]]
    scales = [100 / loss for loss in (first["loss"], *first["loss_by_range"])]
    pairs = zip(estimates, scales, strict=True)
    return [(one["mean"] * scale, one["half"] * scale) for one, scale in pairs]


def _change(mean: float, half: float) -> str:
    return f"{signed(mean, 1)} ± {half:.1f}" if half == half else signed(mean, 1)


def _table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    first, *others = rows
    blank = [""] * len(first["loss_by_range"])
    lines = [[first["name"], plain(first["loss"]), "", *blank]]
    for row in others:
        changes = [_change(*pair) for pair in _changes(first, row)]
        lines.append([row["name"], plain(row["loss"]), *changes])
    return lines


def _headline(rows: Sequence[dict[str, Any]]) -> str:
    """The change of each model of all timesteps; of one model alone its loss."""
    first, *others = rows
    if not others:
        return f"the loss of {first['name']} is {plain(first['loss'])} over all timesteps"
    shown = [row for row in others if row["range"] is None] or others
    told = [f"{row['name']} {_change(*_changes(first, row)[0])} %" for row in shown]
    return f"loss over all timesteps against {first['name']}: {', '.join(told)}"


def draw_losses(
    rows: Sequence[dict[str, Any]], buckets: Ranges, ranges: Ranges, *, foot: str
) -> list[bytes]:
    """On top the change in per cent against the timestep, with 95 % intervals for the models of all
    timesteps; an expert is drawn strong in its own range and thin outside it, where the axis does
    not follow it. Below, the losses themselves, and the changes by range as a table of colours.
    """
    spans = [None if row["range"] is None else _span(row["range"]) for row in rows]
    inside = [
        np.array([s is None or (b.start < s.stop and b.stop > s.start) for b in buckets])
        for s in spans
    ]
    styles = _styles(rows)
    edges = np.array([0, *(bucket.stop for bucket in buckets)])
    middles = (edges[:-1] + edges[1:]) / 2

    def draw(figure: Figure) -> None:
        heights = [3.2, 2.2 + 0.16 * len(rows)]
        upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        top = upper.subplots()
        _draw_changes(top, rows, middles, inside, styles)
        left, right = lower.subplots(1, 2, width_ratios=[1, 1.25])
        for row, mine, style in zip(rows, inside, styles, strict=True):
            left.plot(middles, np.where(mine, row["losses"], np.nan), **style)
        left.set_yscale("log")
        left.set_ylabel("mean squared error")
        left.set_title("Denoising loss, experts in their ranges", fontsize=10, loc="left")
        _draw_table(right, rows, [*map(str, ranges), "all"])
        for axis in (top, left):
            open_axis(axis)
            axis.set_xlim(0, edges[-1])
            axis.set_xlabel("timestep t (0 = clean)")
            for span in ranges[1:]:
                axis.axvline(span.start, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))
        handles, labels = (left if len(rows) == 1 else top).get_legend_handles_labels()
        top.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False,
            fontsize=8,
        )  # fmt: skip

    return render(
        draw, size=(10.4, 5.9 + 0.16 * len(rows)),
        title="Where each model gained, and where it lost",
        foot=f"{foot}; bands: 95 %, pointwise, over images",
    )  # fmt: skip


def _span(text: str) -> TimestepRange:
    start, stop = text.split(":")
    return TimestepRange(int(start), int(stop))


def _styles(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Label, colour, width and dashes of each model."""
    styles, place = [], 0
    for index, row in enumerate(rows):
        name = shorten(row["name"], _NAME)
        style: dict[str, Any] = {"color": OTHER, "linewidth": 1.6, "linestyle": (0, (5, 1, 1, 1))}
        if index == 0:
            style = {"color": BASE, "linewidth": 2.2}
        elif row["range"] is not None:
            dashes = "-" if place < 6 else (0, (4, 1.5))
            style = {"color": color_of(place), "linewidth": 3.2, "linestyle": dashes}
        elif row["kind"] in ("ensemble", "merged"):  # the ensemble runs on its experts' lines
            color, width = (ENSEMBLE, 1.0) if row["kind"] == "ensemble" else (MERGED, 1.6)
            style = {"color": color, "linewidth": width, "zorder": 3}
        place += row["range"] is not None
        label = name if row["range"] is None else f"{name}, {row['range']}"
        styles.append({**style, "label": label})
    return styles


def _draw_changes(
    axis: Axes, rows: Sequence[dict[str, Any]], middles: np.ndarray,
    inside: Sequence[np.ndarray], styles: Sequence[dict[str, Any]],
) -> None:  # fmt: skip
    from matplotlib.ticker import NullLocator

    first, reach = rows[0], [0.0]
    scale = 100 / np.array(first["losses"])
    axis.axhline(0, **styles[0])
    for row, mine, style in zip(rows[1:], inside[1:], styles[1:], strict=True):
        change = np.array(row["differences"]) * scale
        half = np.array(row["difference_halves"]) * scale
        reach += [value for value in change[mine].tolist() if np.isfinite(value)]
        if row["range"] is None:
            axis.plot(middles, change, **style)
            band = {"color": style["color"], "alpha": 0.16, "linewidth": 0}
            axis.fill_between(middles, change - half, change + half, **band)
        else:
            axis.plot(middles, change, color=style["color"], linewidth=0.7, alpha=0.7)
            axis.plot(middles, np.where(mine, change, np.nan), **style)
    low, high = min(reach) * _FAR - 1, max(reach) * _FAR + 1
    axis.set_yscale("symlog", linthresh=_NEAR, linscale=1.2)
    ticks = [tick for tick in _TICKS if tick <= max(-low, high)]
    shown = [t for t in (*(-tick for tick in ticks[::-1]), 0, *ticks) if low <= t <= high]
    axis.set_yticks(shown, [f"{tick:+d}" if tick else "0" for tick in shown], fontsize=8)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)
    axis.set_ylabel(f"loss against {shorten(first['name'], _NAME)}, %")
    axis.set_title(
        "Change of the denoising loss (below 0 is better; logarithmic beyond 5 %)",
        fontsize=10, loc="left",
    )  # fmt: skip


def _draw_table(axis: Axes, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Change by range in per cent, a row per model, the last column over all timesteps; grey where
    the interval does not tell it from 0."""
    first, *others = rows
    if not others:
        axis.set_axis_off()
        return
    pairs = np.array([_changes(first, row) for row in others])  # (models, 1 + ranges, 2)
    values, halves = np.roll(pairs, -1, axis=1).transpose(2, 0, 1)
    limit = float(np.clip(np.nanquantile(np.abs(values), 0.8), 0.5, 100))
    axis.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        is_told = abs(value) > halves[y, x]
        color = "white" if abs(value) > 0.62 * limit else "black" if is_told else "0.5"
        axis.text(x, y, f"{value:+.1f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if len(names) < 7 else 35)
    short = [shorten(row["name"], _NAME) for row in others]
    axis.set_yticks(range(len(others)), short, fontsize=8)
    axis.axvline(len(names) - 1.5, color="white", linewidth=3)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("Change by range, % (grey: within its interval)", fontsize=10, loc="left")
