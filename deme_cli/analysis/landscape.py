"""The denoising loss over a plane of weights, of all timesteps and of each range.

(The paper's figures 4 and 6a; Li et al. 2018 for random planes.) All points are measured on the
same draws (image, t, eps), one forward each, whose errors are then grouped by the range of t: what
differs between two points or two ranges is not chance. The lowest of many points is picked, so how
much lower it is than the origin is measured again, on fresh draws (seed + 1, more of them), and so
are the slopes at the origin and the models themselves. Those differences are paired by draw, their
intervals are over images.
n draws, G groups: all timesteps, then each range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import shorten
from deme_cli.analysis.landscape_picture import draw_landscape, percent_of
from deme_cli.analysis.result import (
    Analysis,
    Unfinished,
    check_images,
    check_output,
    document_bytes,
    own_base,
    write_analysis,
)
from deme_cli.analysis.settings import LandscapeConfig
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, split_uniform

if TYPE_CHECKING:
    from deme_cli.analysis.plane import Basis, Plane, WeightsOf
    from deme_cli.diffusion.schedule import Schedule
    from deme_cli.merging.objectives import HeldOutLoss
    from deme_cli.training.examples import Examples

Spans = Sequence[TimestepRange]
_UNMEASURED = -1.0  # no loss is negative; one that is not finite is kept as nan
_STENCIL = 0.25  # of a step of the grid, to each side of the origin: slopes


def analyze_landscape(
    models: Sequence[str | Path] = (),
    settings: LandscapeConfig | None = None,
    *,
    marks: Sequence[str | Path] = (),
    images: DataConfig | None = None,
    split: str = "train",
    num_ranges: int | None = None,
    output: Path = Path("landscape.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure the loss on a plane of weights, of all timesteps and by range.

    models: one, around which two random directions make the plane (the base of `run` if none), or
    the origin and two finetuned from it.   marks: models to show where they lie on the plane of
    three.   num_ranges: equal ranges to tell apart; None for those of `run` or of the experts.

    The rest is as for `analyze_losses`.
    """
    from deme_cli.diffusion.model_files import locate_model, peek_timesteps

    run, settings = run or RunFile(), settings or LandscapeConfig()
    check_output(output, force=force)
    named = [str(model) for model in models] or [own_base(run)]
    along, arguments = _along(len(named), has_marks=bool(marks)), [*named, *map(str, marks)]
    known = [peek_timesteps(locate_model(argument)) for argument in arguments]
    ranges = _ranges(run, arguments, num_ranges, known[0]) if known[0] else None
    images = check_images(images, run, split=split)
    spans = f"each of {', '.join(map(str, ranges))}" if ranges else "each range"
    progress(Step(note=(
        f"{along}, {', '.join(arguments)}: {settings.points**2:,} points of {settings.num:,} draws "
        f"from {images.source} ({split}), for all timesteps and {spans}"
    )))  # fmt: skip
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import identity_of, open_images
    from deme_cli.analysis.plane import read_models, vectors_basis
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.diffusion.schedule import read_schedule

    frozen = run.pipeline(pipeline)
    opened = read_models(arguments, pipeline=frozen)
    basis = None if len(named) == 1 else vectors_basis(opened)
    record, examples = open_images(
        opened[0].record, images, run, split=split, model=named[0], output=output,
        pipeline=pipeline, device=device, progress=progress,
    )  # fmt: skip
    schedule = read_schedule(record.scheduler_config, named[0])
    whole = TimestepRange(0, record.num_train_timesteps)
    groups = [whole, *(ranges or _ranges(run, arguments, num_ranges, len(whole)))]
    axes = axes_of(None if basis is None else basis.coordinates, settings)
    identity = {
        "models": [model.record.fingerprint for model in opened], "spanning models": len(named),
        **identity_of(record, examples), "split": split, "along": along,
        "points": settings.points, "span": settings.reach(along),
        "ranges": [str(span) for span in groups[1:]], "num": settings.num,
        "report_num": settings.report_num, "seed": settings.seed,
    }  # fmt: skip
    with Unfinished(output, identity, force=force) as kept:
        measured = _Measured(examples, schedule, settings, groups)
        plane = functools.cache(
            lambda: _plane(opened, basis, settings.seed, str(choose_device(device)), frozen)
        )
        measured.fill(opened, plane, axes, kept, progress)
        result = measured.summary(opened, basis, axes, kept.arrays)
        protocol = _protocol(opened, len(named), split, settings, examples)
        return _written(kept, opened, basis, axes, result, protocol)


def _along(num_models: int, *, has_marks: bool) -> str:
    """What makes the plane of so many models. Raises ConfigError where they make none."""
    if num_models not in (1, 3):
        raise ConfigError(
            f"{num_models} models given: expected one, for random directions, or three: the origin "
            f"and two finetuned from it"
        )
    if has_marks and num_models == 1:
        raise ConfigError("--mark: models are marked on the plane of three models, not on random")
    return "random" if num_models == 1 else "vectors"


def _ranges(
    run: RunFile, arguments: Sequence[str], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """The ranges told apart: `n` equal ones, else those of the split, else the experts' own.

    A split that lacks the range of one of the experts is not theirs. Raises ConfigError where one
    reaches past T.
    """
    from deme_cli.artifacts import ExpertRecord
    from deme_cli.evaluation.rows import record_of_file

    if n is not None:
        return split_uniform(n, num_train_timesteps)
    records = [record_of_file(argument) for argument in arguments]
    own = {record.timesteps for record in records if isinstance(record, ExpertRecord)}
    parts = {span for span in own if len(span) < num_train_timesteps}
    settings = run.settings(SplitConfig)
    split = settings.timestep_ranges
    ranges = list(split) if split and parts <= set(split) else sorted(parts)
    ranges = ranges or split_uniform(settings.n, num_train_timesteps)
    if past := next((span for span in ranges if span.stop > num_train_timesteps), None):
        raise ConfigError(
            f"[split] ranges: {past} reaches past the {num_train_timesteps} timesteps of this "
            f"model; correct deme.toml, or give -n"
        )
    return ranges


def axes_of(coordinates: np.ndarray | None, settings: LandscapeConfig) -> list[np.ndarray]:
    """The coordinates of the points along each axis, in rising order, 0 among them.

    coordinates: (N, 2) of the models besides the origin, all inside; None on a random plane.
    """
    points = settings.points
    if coordinates is None:
        reach = settings.reach("random")
        return [_axis(-reach, reach, points)] * 2
    low, high = np.minimum(coordinates.min(axis=0), 0), np.maximum(coordinates.max(axis=0), 0)
    margin = settings.reach("vectors") * (high - low).max()
    return [_axis(a - margin, b + margin, points) for a, b in zip(low, high, strict=True)]


def _axis(low: float, high: float, points: int) -> np.ndarray:
    """Evenly spaced values of which one is 0, from `low` < 0 or below to `high` > 0 or above."""
    zero = int(np.clip(round(-low / (high - low) * (points - 1)), 1, points - 2))
    step = max(-low / zero, high / (points - 1 - zero))
    return (np.arange(points) - zero) * step


def held_out_loss(
    examples: Examples, schedule: Schedule, settings: LandscapeConfig, *, fresh: bool
) -> HeldOutLoss:
    """The draws of every point, or the fresh ones: draw i from (seed, i), t stratified over [0, T).

    The fresh ones are those of seed + 1.
    """
    from deme_cli.config import MergeConfig
    from deme_cli.merging.objectives import HeldOutLoss
    from deme_cli.sampling.sampler import seeded_noise

    num, seed = settings.num, settings.seed
    if fresh:
        num, seed = settings.report_num, settings.seed + 1
    config = MergeConfig(num=num, seed=seed, batch_size=settings.batch_size)
    loss = HeldOutLoss(examples, schedule, config)
    if not fresh:  # asked for at every point: the noise is drawn once
        eps = seeded_noise(seed, examples.shape, range(num))
        loss.draws = replace(loss.draws, noise=eps.__getitem__)
    return loss


def _plane(
    models: Sequence[WeightsOf], basis: Basis | None, seed: int, device: str, pipeline: str | None
) -> Plane:
    from deme_cli.analysis.plane import Plane, mixed_directions, open_origin, random_direction

    denoiser = open_origin(models[0], device=device, pipeline=pipeline)
    network = denoiser.network
    if basis is not None:
        return Plane(network, mixed_directions(network, models[1:], basis.mixing))
    drawn = [random_direction(network.state_dict(), seed, axis) for axis in (0, 1)]
    moved = [{name: one.to(denoiser.device) for name, one in d.items()} for d in drawn]
    return Plane(network, moved)


class Groups:
    """The draws of a loss by the range of their time.

    Raises ConfigError where a range has fewer than two draws.
    """

    def __init__(self, spans: Spans, loss: HeldOutLoss) -> None:
        self.images = loss.draws.images.numpy()
        self.masks = np.array([loss.draws_in(span).numpy() for span in spans])  # (G, n)
        for span, mask in zip(spans, self.masks, strict=True):
            if mask.sum() < 2:
                raise ConfigError(
                    f"timesteps {span} have {mask.sum()} of {len(mask)} draws; raise --num and "
                    f"--report-num, or tell fewer ranges apart"
                )

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean of each group: (n,) -> (G,); nan where it is not finite."""
        with np.errstate(invalid="ignore", over="ignore"):
            means = np.array([values[mask].mean() for mask in self.masks])
        return np.where(np.isfinite(means), means, np.nan)

    def intervals(self, values: np.ndarray) -> np.ndarray:
        """Half the 95 % interval of each mean over images: (n,) -> (G,)."""
        from deme_cli.analysis.draws import estimate

        return np.array([estimate(values[mask], self.images[mask]).half for mask in self.masks])


class _Measured:
    """The errors at the points of a plane, and what they say.

    Arrays by name: `grid` (points, G) means over the fixed draws; on fresh draws, each error,
    `probes` (the origin, two points on each axis beside it, the other models) and `picked`.
    """

    def __init__(
        self, examples: Examples, schedule: Schedule, settings: LandscapeConfig, groups: Spans
    ) -> None:
        self.settings, self.groups = settings, groups
        self.losses = [held_out_loss(examples, schedule, settings, fresh=f) for f in (False, True)]
        self.of_grid, self.of_fresh = (Groups(groups, loss) for loss in self.losses)

    def fill(
        self, models: Sequence[WeightsOf], plane: Callable[[], Plane], axes: Sequence[np.ndarray],
        kept: Unfinished, progress: Progress,
    ) -> None:  # fmt: skip
        """Measure what is missing. Raises NumericsError where the origin's loss is not finite."""
        grid = [(float(x), float(y)) for x in axes[0] for y in axes[1]]
        probes: list[tuple[float, ...] | WeightsOf] = [(0.0, 0.0)]
        for axis in (0, 1):
            for side in (-1, 1):
                step = side * self._stencil(axes[axis])
                probes.append((step, 0.0) if axis == 0 else (0.0, step))
        probes += models[1:]
        total = len(probes) + len(grid) + 1 + len(self.groups)
        done = sum(int((rows[:, 0] != _UNMEASURED).sum()) for rows in kept.arrays.values())
        note = f"continuing after {done} points" if done else kept.note
        progress(Step(done, total, "landscape", "point", note))

        def measure(name: str, spots: Sequence[Any], *, fresh: bool = True) -> np.ndarray:
            nonlocal done
            width = self.settings.report_num if fresh else len(self.groups)
            empty = np.full((len(spots), width), _UNMEASURED)
            rows = kept.arrays.setdefault(name, empty)
            for row, spot in zip(rows, spots, strict=True):
                if row[0] != _UNMEASURED:
                    continue
                check = kept.checker(f"{done} of {total} points")
                check()
                if isinstance(spot, tuple):
                    plane().put(spot)
                else:
                    plane().put_model(spot.weights)
                network, draws = plane().network, self.losses[fresh].draws
                errors = draws.errors(network, check=check).numpy()
                errors = np.where(np.isfinite(errors), errors, np.nan)
                row[:] = errors if fresh else self.of_grid.means(errors)
                done += 1
                progress(Step(done, total, "landscape", "point"))
            return rows

        self._require_finite(models[0], self.of_fresh.means(measure("probes", probes)[0]))
        losses = measure("grid", grid, fresh=False)
        self._require_finite(models[0], losses[grid.index((0.0, 0.0))])
        measure("picked", [grid[index] for index in self._picked(losses, grid)])

    def _picked(self, losses: np.ndarray, grid: Sequence[tuple[float, ...]]) -> list[int]:
        """The origin, then the lowest point of each group that is not among them."""
        lowest = [int(np.nanargmin(column)) for column in losses.T]
        return list(dict.fromkeys([grid.index((0.0, 0.0)), *lowest]))

    def _stencil(self, axis: np.ndarray) -> float:
        return _STENCIL * float(axis[1] - axis[0])

    def _require_finite(self, origin: WeightsOf, losses: np.ndarray) -> None:
        for span, loss in zip(self.groups, losses, strict=True):
            if not np.isfinite(loss):
                raise NumericsError(
                    f"{origin.argument}: the loss of timesteps {span} is not finite; the model's "
                    f"weights are broken"
                )

    def summary(
        self, models: Sequence[WeightsOf], basis: Basis | None, axes: Sequence[np.ndarray],
        arrays: dict[str, np.ndarray],
    ) -> dict[str, Any]:  # fmt: skip
        """What the errors say, a row per group or model; losses (points, points) of each group."""
        losses = arrays["grid"].T.reshape(-1, *map(len, axes))
        probes, spans = arrays["probes"], [str(span) for span in self.groups]
        return {
            "origin": self._origin(axes, probes),
            "lowest": self._lowest(axes, arrays),
            "models": self._models(models, basis, probes),
            "losses": [
                {"timesteps": span, "loss": loss} for span, loss in zip(spans, losses, strict=True)
            ],
        }

    def _origin(self, axes: Sequence[np.ndarray], probes: np.ndarray) -> list[dict[str, Any]]:
        """The loss and its slopes per unit of an axis, by central differences; steepness in per
        cent of the loss per unit."""
        fresh = self.of_fresh
        per_draw = [  # (n,) each
            (probes[2 + 2 * k] - probes[1 + 2 * k]) / (2 * self._stencil(axes[k])) for k in (0, 1)
        ]
        slopes = np.stack([fresh.means(one) for one in per_draw], axis=1)  # (G, 2)
        intervals = np.stack([fresh.intervals(one) for one in per_draw], axis=1)
        lengths, origin = np.linalg.norm(slopes, axis=1), fresh.means(probes[0])
        units = slopes / np.where(lengths > 0, lengths, 1)[:, None]
        along = [fresh.intervals(unit @ np.array(per_draw))[g] for g, unit in enumerate(units)]
        return [
            {
                "timesteps": str(span), "draws": int(mask.sum()), "loss": float(loss),
                "slope": slopes[g], "slope_interval": intervals[g],
                "slope_percent": float(100 / loss * lengths[g]),
                "slope_percent_interval": float(100 / loss * along[g]),
            }
            for g, (span, mask, loss) in enumerate(
                zip(self.groups, fresh.masks, origin, strict=True)
            )
        ]  # fmt: skip

    def _lowest(
        self, axes: Sequence[np.ndarray], arrays: dict[str, np.ndarray]
    ) -> list[dict[str, Any]]:
        """The lowest point of each group, and its difference to the origin on fresh draws."""
        grid = [(float(x), float(y)) for x in axes[0] for y in axes[1]]
        picked, fresh = self._picked(arrays["grid"], grid), self.of_fresh
        rows = []
        for g, (span, column) in enumerate(zip(self.groups, arrays["grid"].T, strict=True)):
            index = int(np.nanargmin(column))
            reference, errors = arrays["picked"][0], arrays["picked"][picked.index(index)]
            difference = float(fresh.means(errors - reference)[g])
            interval = float(fresh.intervals(errors - reference)[g])
            origin, place = float(fresh.means(reference)[g]), divmod(index, len(axes[1]))
            is_at_edge = any(i in (0, len(axis) - 1) for i, axis in zip(place, axes, strict=True))
            rows.append({
                "timesteps": str(span), "coordinates": list(grid[index]),
                "loss": float(column[index]), "at_edge": is_at_edge, "difference": difference,
                "interval": interval, "percent": 100 * difference / origin,
                "percent_interval": 100 * interval / origin,
            })  # fmt: skip
        return rows

    def _models(
        self, models: Sequence[WeightsOf], basis: Basis | None, probes: np.ndarray
    ) -> list[dict[str, Any]]:
        """Each model's place, its L2 distance from there, and its own losses by group."""
        fresh = self.of_fresh
        losses = fresh.means(probes[0])
        rows = []
        for i, model in enumerate(models):
            errors = probes[0] if i == 0 else probes[len(probes) - len(models) + i]
            place, distance = [0.0, 0.0], 0.0
            if i and basis is not None:
                place, distance = basis.coordinates[i - 1].tolist(), float(basis.distances[i - 1])
            percent, interval = (
                100 * of(errors - probes[0]) / losses if i else np.zeros(len(losses))
                for of in (fresh.means, fresh.intervals)
            )
            rows.append({
                "name": model.name, "coordinates": place, "distance_from_landscape": distance,
                "losses": fresh.means(errors), "percent": percent, "percent_interval": interval,
            })  # fmt: skip
        return rows


def _protocol(
    models: Sequence[WeightsOf], num_spanning: int, split: str, settings: LandscapeConfig,
    examples: Examples,
) -> dict[str, Any]:  # fmt: skip
    along = _along(num_spanning, has_marks=False)
    return {
        "along": along, "spanning": num_spanning,
        "models": [
            {"source": model.argument, "kind": model.record.kind,
             "fingerprint": model.record.fingerprint}
            for model in models
        ],
        "data": {"source": examples.source, "fingerprint": examples.fingerprint},
        "image_shape": list(examples.image_shape), "split": split, "points": settings.points,
        "span": settings.reach(along), "num": settings.num, "seed": settings.seed,
        "report_num": settings.report_num, "report_seed": settings.seed + 1,
        "intervals": "95 %, over images (draws of one image are a cluster)",
    }  # fmt: skip


def _written(
    kept: Unfinished, models: Sequence[WeightsOf], basis: Basis | None,
    axes: Sequence[np.ndarray], result: dict[str, Any], protocol: dict[str, Any],
) -> Analysis:  # fmt: skip
    labels = _axis_labels(models, protocol["along"])
    place = _place(models, protocol["along"])
    document = {
        "reading": _headline(place, result), "protocol": protocol,
        "axes": [
            {"label": label.replace("\n", " "), "values": axis.tolist()}
            for label, axis in zip(labels, axes, strict=True)
        ],
        "geometry": _geometry(models[0], basis, protocol["seed"]), **result,
    }  # fmt: skip
    foot = (
        f"{protocol['data']['source']} ({protocol['split']}), {protocol['num']:,} draws, the same "
        f"at all {protocol['points'] ** 2:,} points; numbers: {protocol['report_num']:,} fresh "
        f"draws, ± 95 % over images; seed {protocol['seed']}"
    )
    drawn = draw_landscape(result, axes, labels, title=f"Denoising loss {place}", foot=foot)
    return write_analysis(
        kept, drawn, document_bytes("landscape", document),
        shown=("reading", "origin", "lowest", "models"),
        columns=["timesteps", "loss at origin", "slope there, %", "lowest point, %", "at"],
        rows=_table(result),
    )  # fmt: skip


def _geometry(origin: WeightsOf, basis: Basis | None, seed: int) -> dict[str, Any]:
    from deme_cli.analysis.plane import cosine, random_direction

    if basis is not None:
        return {"explained": basis.shares}
    return {"cosine": cosine(*(random_direction(origin.weights, seed, i) for i in (0, 1)))}


def _place(models: Sequence[WeightsOf], along: str) -> str:
    names = [shorten(model.name, 24) for model in models]
    if along == "random":
        return f"on a random plane through {names[0]}"
    return f"on the plane of {names[0]}, {names[1]} and {names[2]}"


def _axis_labels(models: Sequence[WeightsOf], along: str) -> list[str]:
    """What lies along each axis, with its unit."""
    if along == "random":
        return [f"random direction {i}\n(1: as long as the weights)" for i in (1, 2)]
    origin, first, second = (shorten(model.name, 20) for model in models[:3])
    return [
        f"L2 distance along {first} - {origin}", f"L2 distance, what {second} - {origin} adds"
    ]  # fmt: skip


def _table(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for origin, lowest in zip(result["origin"], result["lowest"], strict=True):
        where = ", ".join(f"{value:.3g}" for value in lowest["coordinates"])
        lines.append([
            origin["timesteps"], f"{origin['loss']:.4g}",
            percent_of(origin, "slope_percent", sign=False), percent_of(lowest),
            f"{where}{' (edge)' if lowest['at_edge'] else ''}",
        ])  # fmt: skip
    return lines


def _headline(place: str, result: dict[str, Any]) -> str:
    whole, name = result["lowest"][0], result["models"][0]["name"]
    if not any(whole["coordinates"]):
        return f"{place} no point has a lower loss over all timesteps than {name}"
    return f"{place} the lowest loss over all timesteps is {percent_of(whole)} % of that of {name}"
