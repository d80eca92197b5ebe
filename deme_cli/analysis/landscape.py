"""The denoising loss over a plane of weights, of all timesteps and of each range.

(The paper's figures 4 and 6a; Li et al. 2018 for random planes.) All points are measured on the
same draws (image, t, eps), one forward each, whose errors are then grouped by the range of t: what
differs between two points or two ranges is not chance. The lowest of many points is picked, so how
much lower it is than the origin is measured again, on fresh draws (seed + 1, more of them), and so
are the models themselves. Those differences are paired by draw, their intervals are over images.
A point is theta(c) = theta_0 + c_1 d_1 + c_2 d_2, the d_k random, or an orthonormal basis of the
plane of two task vectors tau_i = theta_i - theta_0 (Gram and Schmidt).
n draws, G groups: all timesteps, then each range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLACK, DIVERGING, color_of, render, shorten
from deme_cli.analysis.result import (
    Analysis,
    Kept,
    check_inputs,
    keeping,
    own_base,
    peek,
    ranges_of,
    write_analysis,
)
from deme_cli.analysis.settings import LandscapeConfig
from deme_cli.config import DataConfig
from deme_cli.console import Progress, Step, decimals, fixed, signed, silent
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from deme_cli.diffusion.denoiser import Denoiser
    from deme_cli.training.batches import FixedDraws

    Weights = Mapping[str, Tensor]

Row = dict[str, Any]
Place = tuple[float, float]
_PARALLEL = 1e-8  # 1 - cosine^2 below which two vectors span no plane (the float32 of weights)
_ROUNDING = 1e-8  # share of a squared length that the float32 of weights explains
_MARKERS = "sD^vPX<>"


def analyze_landscape(
    models: Sequence[str | Path] = (), settings: LandscapeConfig | None = None, *,
    marks: Sequence[str | Path] = (), images: DataConfig | None = None, split: str = "train",
    num_ranges: int | None = None, output: Path = Path("landscape.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure the loss on a plane of weights, of all timesteps and by range.

    models: one, around which two random directions make the plane (the base of `run` if none), or
    the origin and two finetuned from it.   marks: models to show where they lie on the plane of
    three.   num_ranges: equal ranges to tell apart; None for those of `run` or of the experts.

    The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or LandscapeConfig()
    images = check_inputs(output, images, run, split=split, force=force)
    named = [str(model) for model in models] or [own_base(run)]
    if len(named) not in (1, 3):
        raise ConfigError(
            f"{len(named)} models given: expected one, for random directions, or three: the origin "
            f"and two finetuned from it"
        )
    if len(named) == 1 and marks:
        raise ConfigError("--mark: models are marked on the plane of three models, not on random")
    arguments, along = [*named, *map(str, marks)], "random" if len(named) == 1 else "vectors"
    records, (whole, *_) = zip(*map(peek, arguments), strict=True)
    ranges = ranges_of(run, records, num_ranges, whole) if whole else []
    spans = f"each of {', '.join(map(str, ranges))}" if ranges else "each range"
    progress(Step(note=(
        f"{along}, {', '.join(arguments)}: {settings.points**2:,} points of {settings.num:,} draws "
        f"from {images.source} ({split}), for all timesteps and {spans}"
    )))  # fmt: skip
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import INTERVALS, open_images, open_models, spread_draws
    from deme_cli.diffusion.denoiser import choose_device

    opened = open_models(arguments, run=run, pipeline=run.pipeline(pipeline))
    origin = opened[0]
    groups = [TimestepRange(0, origin.record.num_train_timesteps)]
    groups += ranges or ranges_of(run, records, num_ranges, len(groups[0]))
    examples, data, seen = open_images(
        origin.record, images, split, run=run, output=output, pipeline=pipeline, device=device,
        progress=progress,
    )  # fmt: skip
    fresh = replace(settings, num=settings.report_num, seed=settings.seed + 1)
    draws = [spread_draws(examples, origin.schedule, groups[:1], one) for one in (settings, fresh)]
    directions, rows = _plane(opened, arguments, settings.seed)
    axes = axes_of([row["coordinates"] for row in rows], settings)
    protocol = {
        "along": along, "models": {row["name"]: row["fingerprint"] for row in rows}, "data": data,
        **asdict(settings), "intervals": INTERVALS,
    }  # fmt: skip
    plane = Plane(origin.network.to(choose_device(device)), directions)
    total = settings.points**2 + len(rows) + len(groups)
    with keeping(
        output, {**protocol, **seen, "groups": groups}, "landscape", "point", total,
        progress=progress, force=force,
    ) as kept:  # fmt: skip
        networks = [denoiser.network for denoiser in opened]
        result = _measure(plane, networks, rows, axes, groups, draws, kept)
        return _written(output, axes, result, protocol)


def _plane(
    opened: Sequence[Denoiser], arguments: Sequence[str], seed: int
) -> tuple[list[Weights], list[Row]]:
    """The directions, random ones of a model alone; of each model its name, its place on the plane
    and how far off it that is."""
    stems = [Path(argument).stem for argument in arguments]
    names = stems if len(set(stems)) == len(stems) else arguments
    origin, *others = (one.network.state_dict() for one in opened)
    vectors = [task_vector(origin, other) for other in others]
    if vectors:
        directions = spanned(vectors[0], vectors[1], names)
    else:
        directions = [random_direction(origin, seed, axis) for axis in (0, 1)]
    places = [((0.0, 0.0), 0.0), *(seen_on(directions, vector) for vector in vectors)]
    return directions, [
        {"name": name, "source": argument, "fingerprint": one.record.fingerprint,
         "coordinates": place, "distance_from_landscape": off}
        for name, argument, one, (place, off) in zip(names, arguments, opened, places, strict=True)
    ]  # fmt: skip


def dot(a: Weights, b: Weights) -> float:
    """Over the names of `a`, in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def task_vector(origin: Weights, model: Weights) -> Weights:
    """theta_i - theta_0 in float32, of what can be moved."""
    floats = (name for name, theta in origin.items() if theta.is_floating_point())
    return {name: model[name].float() - origin[name].float() for name in floats}


def spanned(tau: Weights, other: Weights, names: Sequence[str]) -> list[Weights]:
    """An orthonormal basis of the plane of two task vectors, the first direction along `tau`.

    Raises ArtifactError where they are parallel or one is zero; `names`: of origin and both.
    """
    squares, product = (dot(tau, tau), dot(other, other)), dot(tau, other)
    for name, square in zip(names[1:], squares, strict=False):
        if square == 0:
            raise ArtifactError(
                f"{name} has the weights of {names[0]}, so there is no direction from one to the "
                f"other; give another model"
            )
    if 1 - product**2 / (squares[0] * squares[1]) < _PARALLEL:
        raise ArtifactError(
            f"the task vectors of {names[1]} and {names[2]} span no plane: their cosine is "
            f"{product / (squares[0] * squares[1]) ** 0.5:.6f}; give two different experts"
        )
    rest = {name: one - product / squares[0] * tau[name] for name, one in other.items()}
    return [
        {name: one / dot(vector, vector) ** 0.5 for name, one in vector.items()}
        for vector in (tau, rest)
    ]


def seen_on(directions: Sequence[Weights], tau: Weights) -> tuple[Place, float]:
    """Where a model lies on a plane of orthonormal directions, and its L2 distance from there."""
    x, y = (dot(direction, tau) for direction in directions)
    rest = {n: one - x * directions[0][n] - y * directions[1][n] for n, one in tau.items()}
    beyond, length = dot(rest, rest), dot(tau, tau)
    return (x, y), beyond**0.5 if beyond > _ROUNDING * length else 0.0


def random_direction(weights: Weights, seed: int, axis: int) -> Weights:
    """A Gaussian direction, filter-normalised: each filter as long as the model's (Li et al. 2018).

    A filter is a slice along the first dimension of a tensor of two dimensions or more; biases and
    the scales of norms (one dimension) are not moved. Each tensor has its own seed, made of `seed`,
    `axis` and its name. Two directions are not made orthogonal: in a space of n dimensions their
    cosine is about 1 / sqrt(n).
    """
    import torch

    from deme_cli.training.batches import derived_generator

    direction = {}
    for name, theta in weights.items():
        if theta.is_floating_point() and theta.ndim > 1:
            generator = derived_generator(seed, "landscape", axis, name)
            drawn = torch.randn(theta.shape, generator=generator)
            scale = theta.float().flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
            direction[name] = drawn * scale.view(-1, *[1] * (theta.ndim - 1))
    return direction


class Plane:
    """theta_0, which `network` has now, and two directions, in float32 on its device.

    A name that directions lack stays put.
    """

    def __init__(self, network: nn.Module, directions: Sequence[Weights]) -> None:
        self.network = network
        floats = {n: w for n, w in network.state_dict().items() if w.is_floating_point()}
        self.origin = {name: theta.float().clone() for name, theta in floats.items()}
        device = next(network.parameters()).device
        self.directions = [{n: one.to(device) for n, one in d.items()} for d in directions]

    def put(self, coordinates: Sequence[float]) -> None:
        """Give the network the weights theta(c), summed in float32.

        At c = 0 they are the origin's, bit for bit.
        """
        own = self.network.state_dict()
        for name, theta in self.origin.items():
            for c, direction in zip(coordinates, self.directions, strict=True):
                if name in direction:
                    theta = theta.add(direction[name], alpha=c)
            own[name].copy_(theta)


def axes_of(places: Sequence[Place], settings: LandscapeConfig) -> list[np.ndarray]:
    """The coordinates of the points along each axis, in rising order, 0 among them.

    places: of the models, the origin first, all of them inside; the origin alone on a random plane.
    """
    low, high = np.min(places, axis=0), np.max(places, axis=0)
    margin = (settings.span or 0.25) * (high - low).max() or settings.span or 0.1
    axes = []
    for a, b in zip(low - margin, high + margin, strict=True):
        zero = int(np.clip(round(-a / (b - a) * (settings.points - 1)), 1, settings.points - 2))
        step = max(-a / zero, b / (settings.points - 1 - zero))
        axes.append((np.arange(settings.points) - zero) * step)
    return axes


def _measure(
    plane: Plane, networks: Sequence[nn.Module], models: Sequence[Row],
    axes: Sequence[np.ndarray], groups: Sequence[TimestepRange], draws: Sequence[FixedDraws],
    kept: Kept,
) -> dict[str, Any]:  # fmt: skip
    """A row per group and per model, and the `losses` (G, points, points).

    Raises NumericsError where the origin's loss is not finite.
    """
    import torch

    from deme_cli.analysis.draws import draws_in, estimate

    same, fresh = draws
    masks, fresh_masks = (draws_in(one, groups, least=2) for one in draws)
    eps = same.noise(torch.arange(len(same.t)))  # asked for at every point
    same = replace(same, noise=eps.__getitem__)

    def errors_at(spot: Place | nn.Module, some: FixedDraws) -> np.ndarray:
        if isinstance(spot, tuple):
            plane.put(spot)
        else:  # a model itself, which may lie off the plane
            plane.network.load_state_dict(spot.state_dict())
        return some.errors(plane.network, check=kept.check).numpy()

    def losses_at(index: int) -> np.ndarray:
        def measure() -> Row:
            return {"losses": _means(errors_at(grid[index], same), masks)}

        return kept.unit(f"point {index}", 1, measure)["losses"]

    def again(name: str, spot: Place | nn.Module) -> np.ndarray:
        return kept.unit(name, 1, lambda: {"errors": errors_at(spot, fresh)})["errors"]

    def percent(errors: np.ndarray) -> np.ndarray:
        """How much larger errors (n,) are than the origin's own, in per cent, and half of the
        95 % interval of that, by group: (2, G)."""
        pairs = [estimate((errors - own)[mask], fresh.images.numpy()[mask]) for mask in fresh_masks]
        return 100 * np.array(pairs).T / own_losses

    grid = [(float(x), float(y)) for x in axes[0] for y in axes[1]]
    zero = grid.index((0.0, 0.0))
    own = again(f"fresh {zero}", grid[zero])
    own_losses = _means(own, fresh_masks)
    for span, loss in zip(groups, own_losses, strict=True):
        if not np.isfinite(loss):
            raise NumericsError(
                f"{models[0]['source']}: the loss of timesteps {span} is not finite; the model's "
                f"weights are broken"
            )
    losses = np.array([losses_at(index) for index in range(len(grid))]).T  # (G, points^2)
    described: list[Row] = []
    for g, (span, mask) in enumerate(zip(groups, fresh_masks, strict=True)):
        lowest = int(np.nanargmin(losses[g]))
        change, half = percent(again(f"fresh {lowest}", grid[lowest]))[:, g]
        place = zip(divmod(lowest, len(axes[1])), axes, strict=True)
        described.append({
            "timesteps": str(span), "draws": int(mask.sum()), "loss": float(own[mask].mean()),
            "lowest": grid[lowest], "at_edge": any(i in (0, len(axis) - 1) for i, axis in place),
            "percent": change, "percent_interval": half,
        })  # fmt: skip
    rows = []
    for i, (model, network) in enumerate(zip(models, networks, strict=True)):
        errors = again(f"model {i}", network) if i else own
        change, half = percent(errors)
        told = {"losses": _means(errors, fresh_masks), "percent": change, "percent_interval": half}
        rows.append({**model, **told})
    surfaces = losses.reshape(len(groups), len(axes[0]), -1)
    return {"groups": described, "models": rows, "losses": surfaces}


def _means(errors: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The mean of each group: (n,) -> (G,); nan where it is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        means = np.array([errors[mask].mean() for mask in masks])
    return np.where(np.isfinite(means), means, np.nan)


def _written(
    output: Path, axes: Sequence[np.ndarray], result: dict[str, Any],
    protocol: dict[str, Any],
) -> Analysis:  # fmt: skip
    names = [shorten(model["name"], 20) for model in result["models"]]
    if protocol["along"] == "random":
        place = f"on a random plane through {names[0]}"
        labels = [f"random direction {i} (1: as long as the weights)" for i in (1, 2)]
    else:
        place = f"on the plane of {names[0]}, {names[1]} and {names[2]}"
        labels = [
            f"L2 distance along {names[1]} - {names[0]}", f"L2 distance, what {names[2]} adds"
        ]  # fmt: skip
    lowest = result["groups"][0]
    told = f"is {_percent(lowest)} % off that" if any(lowest["lowest"]) else "is that"
    reading = f"{place} the lowest loss over all timesteps {told} of {names[0]}"
    described = [{"label": x, "values": axis} for x, axis in zip(labels, axes, strict=True)]
    data = protocol["data"]
    foot = (
        f"{data['source']} ({data['split']}), {protocol['num']:,} draws, "
        f"the same at all {protocol['points'] ** 2:,} points; numbers: {protocol['report_num']:,} "
        f"fresh draws, ± 95 % over images; seed {protocol['seed']}"
    )
    rows = [
        [row["timesteps"], f"{row['loss']:.4g}", _percent(row),
         ", ".join(f"{c:.3g}" for c in row["lowest"]) + " (edge)" * row["at_edge"]]
        for row in result["groups"]
    ]  # fmt: skip
    return write_analysis(
        output, "landscape",
        {"reading": reading, "protocol": protocol, "axes": described, **result},
        draw_landscape(result, axes, labels, title=f"Denoising loss {place}", foot=foot),
        shown=("groups", "models"), rows=rows,
        columns=["timesteps", "loss at origin", "lowest point, %", "at"],
    )  # fmt: skip


def _percent(row: Row) -> str:
    """As `-1.9 ± 0.3`."""
    value, interval = row["percent"], row["percent_interval"]
    digits = decimals([interval or value], 2)
    return f"{signed(value, digits)} ± {fixed(interval, digits)}"


def draw_landscape(
    result: dict[str, Any], axes: Sequence[np.ndarray], labels: Sequence[str], *, title: str,
    foot: str,
) -> bytes:  # fmt: skip
    """Contours of the loss against the origin's: a panel for all timesteps and one per range.

    One scale of colours: blue is better than the origin, red is worse, in steps that grow 1, 2, 5,
    10, so that the shape shows near the origin and far from it; the thick line joins the points
    that are as good.
    """
    losses, groups = result["losses"], result["groups"]
    row, column = (int(np.flatnonzero(axis == 0)[0]) for axis in axes)
    percent = 100 * (losses / losses[:, row, column][:, None, None] - 1)
    levels, count = contour_levels(percent), len(losses)
    columns = math.ceil(math.sqrt(count + 1))  # one place for the legend
    rows = math.ceil((count + 1) / columns)
    ratio = np.ptp(axes[0]) / np.ptp(axes[1])
    width, height = 2.75 * min(1, max(ratio, 0.72)), 2.75 * min(1, max(1 / ratio, 0.6))

    def draw(figure: Figure) -> None:
        sheet = figure.subfigures(squeeze=False)[0, 0]  # whose labels are one for all panels
        sheet.supxlabel(labels[0], fontsize=8.5)
        sheet.supylabel(labels[1], fontsize=8.5)
        panels = sheet.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for g, (panel, group) in enumerate(zip(panels, groups, strict=False)):
            filled = _contours(panel, axes, percent[g].T, levels)
            _mark(panel, result["models"], group["lowest"])
            told = f"{_percent(group)} %" if any(group["lowest"]) else "the origin"
            name = f"timesteps {group['timesteps']}" if g else "all timesteps"
            edge = ", at the edge" * group["at_edge"]
            panel.set_title(f"{name}\nlowest: {told}{edge}", fontsize=8)
            panel.tick_params(labelbottom=True)
        for panel in panels[count:]:
            panel.set_axis_off()
        note = "thick line: as good as the origin\nblue: better, red: worse"
        note += "\ngrey: not finite" * bool(np.isnan(losses).any())
        panels[count].legend(
            *panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=8,
            title=note, title_fontsize=8,
        )  # fmt: skip
        bar = sheet.colorbar(filled, ax=panels, ticks=levels, fraction=0.05, pad=0.015, aspect=32)
        shown = [f"{level:+g}" if level else "0" for level in levels]
        bar.ax.set_yticks(levels, shown, fontsize=7.5)
        bar.ax.minorticks_off()
        bar.set_label("denoising loss against the origin's, %", fontsize=8.5)

    size = (width * columns + 1.9, (height + 0.8) * rows + 1.0)
    return render(draw, size=size, title=title, foot=foot)


def contour_levels(percent: np.ndarray) -> np.ndarray:
    """Levels in per cent, symmetric around 0, in steps of 1, 2, 5, 10 up to what nine in ten points
    reach.  percent: (G, points, points), nan where not finite"""
    top = max(float(np.nanquantile(np.abs(percent), 0.9)), 1e-5)
    exponents = range(math.floor(math.log10(top)) - 3, math.ceil(math.log10(top)) + 1)
    steps = np.array([mantissa * 10.0**e for e in exponents for mantissa in (1, 2, 5)])
    positive = steps[(steps > top / 300) & (steps < 2 * top)]
    return np.concatenate([-positive[::-1], [0.0], positive])


def _contours(
    panel: Axes, axes: Sequence[np.ndarray], percent: np.ndarray, levels: np.ndarray
) -> Any:
    from matplotlib.colors import BoundaryNorm

    norm, values = BoundaryNorm(levels, 256, extend="both"), np.ma.masked_invalid(percent)
    panel.set_facecolor("0.8")  # where the loss is not finite
    filled = panel.contourf(*axes, values, levels, cmap=DIVERGING, norm=norm, extend="both")
    lines = levels[(levels > values.min()) & (levels < values.max())]
    if len(lines):
        widths = np.where(lines == 0, 1.3, 0.45)
        panel.contour(*axes, values, lines, colors="0.15", linewidths=widths, linestyles="solid")
    panel.set_aspect("equal")
    panel.set(xlim=axes[0][[0, -1]], ylim=axes[1][[0, -1]])
    return filled


def _mark(panel: Axes, models: Sequence[Row], lowest: Sequence[float]) -> None:
    style: dict[str, Any] = {"edgecolors": BLACK, "linewidths": 0.9, "zorder": 5, "clip_on": False}
    name = f"{shorten(models[0]['name'], 18)} (origin)"
    panel.scatter(0, 0, s=42, c="white", marker="o", label=name, **style)
    for number, row in enumerate(models[1:]):
        color, name = color_of(number), shorten(row["name"], 18)
        look = {**style, "c": color, "marker": _MARKERS[number % len(_MARKERS)]}
        if row["distance_from_landscape"]:
            name += f", {row['distance_from_landscape']:.2g} off the plane"
            look |= {"c": "white", "edgecolors": color, "linewidths": 1.6}
        x, y = row["coordinates"]
        panel.scatter(x, y, s=40, label=name, **look)
    x, y = lowest
    panel.scatter(x, y, s=110, c="#F0E442", marker="*", label="lowest point", **style)
