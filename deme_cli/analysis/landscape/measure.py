"""The denoising loss along a line or over a plane of weights, of all timesteps and of each range.

(The paper's figures 4 and 6a; Li et al. 2018 for random planes; Frankle et al. 2020 for barriers on
a line.) All points are measured on the same draws (image, t, eps), one forward each, whose errors
are then grouped by the range of t: what differs between two points or two ranges is not chance.
The lowest of many points is picked, so how much lower it is than the origin is measured again, on
fresh draws (seed + 1, more of them), and so is all that is told in numbers: slopes, barriers, the
models themselves. Those differences are paired by draw, their intervals are over images.
n draws, k directions, G groups: all timesteps, then each range.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.analysis.draws import identity_of
from deme_cli.analysis.landscape.directions import Basis
from deme_cli.analysis.landscape.field import (
    Crew,
    Field,
    Measured,
    Place,
    Setup,
    held_out_loss,
)
from deme_cli.analysis.landscape.found import Landscape, Pick, Seen
from deme_cli.analysis.landscape.grid import Index, at_origin, axes_of, is_at_edge, origin_index
from deme_cli.analysis.landscape.groups import Groups
from deme_cli.analysis.landscape.launch import lead_launch
from deme_cli.analysis.landscape.progress import Progress
from deme_cli.analysis.landscape.subspace import Model
from deme_cli.analysis.landscape.workers import open_workers
from deme_cli.analysis.unfinished import Step, Unfinished
from deme_cli.analysis_config import LandscapeConfig
from deme_cli.diffusion.schedule import Schedule
from deme_cli.errors import NumericsError
from deme_cli.processes import ALONE, World
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import Check

_STENCIL = 0.25  # of a step of the grid, to each side of the origin: slopes


@dataclass(frozen=True)
class LandscapeAnalysis:
    """What is measured, opened. `models`: the origin first; `basis` is None on a random plane."""

    models: list[Model]
    setup: Setup
    basis: Basis | None
    schedule: Schedule
    examples: Examples
    ranges: list[TimestepRange]
    output: Path

    @property
    def config(self) -> LandscapeConfig:
        return self.setup.config

    @property
    def num_spanning(self) -> int:
        """How many of the models make the line or the plane, the origin among them."""
        return 1 if self.basis is None else 1 + self.basis.num_spanning

    @property
    def axes(self) -> list[np.ndarray]:
        coordinates = np.zeros((0, 2)) if self.basis is None else self.basis.coordinates
        return axes_of(coordinates, self.config)

    def draws_by_group(self, *, fresh: bool) -> Groups:
        """Raises ConfigError where a range has too few draws."""
        loss = held_out_loss(self.examples, self.schedule, self.config, fresh=fresh)
        return Groups(self.groups, loss)

    @property
    def groups(self) -> list[TimestepRange]:
        return [TimestepRange(0, self.schedule.num_train_timesteps), *self.ranges]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: finished points are used again only if all of it agrees."""
        config, record = self.config, self.models[0].record
        return {
            "models": [model.record.fingerprint for model in self.models],
            "spanning models": None if self.basis is None else self.basis.num_spanning,
            **identity_of(record, self.examples),
            "split": self.setup.split,
            "along": config.along,
            "points": config.points,
            "span": config.reach,
            "ranges": [str(span) for span in self.ranges],
            "num": config.num,
            "report_num": config.report_num,
            "seed": config.seed,
        }


def measure_landscape(
    analysis: LandscapeAnalysis, *, force: bool = False, world: World = ALONE
) -> Generator[Step | Landscape]:
    """Measure every point; yields a `Step` per point, and the `Landscape` last.

    The others of `world` are to call `help_landscape`. Finished points are kept beside the output
    until the caller discards them, and used again unless `force`. Raises ConfigError where a range
    has no draws, NumericsError where the loss of the origin is not finite, Stopped after a signal,
    and what the crew raises.
    """
    groups, fresh = (analysis.draws_by_group(fresh=fresh) for fresh in (False, True))
    num = analysis.config.report_num
    probes, grid = _probes(analysis), list(np.ndindex(*map(len, analysis.axes)))
    unfinished = Unfinished(analysis.output, analysis.identity, force=force)
    with unfinished as kept, _crew(analysis, world, kept.check) as crew:
        progress = Progress(kept, crew, total_points(analysis))
        yield Step(progress.done, progress.note)
        errors = progress.rows("probes", len(probes), num)
        yield from progress.fill("probes", probes)
        _require_finite(analysis, fresh.means(errors[0]))
        values = progress.rows("grid", len(grid), len(analysis.groups))
        yield from progress.fill("grid", _places(analysis, grid), groups)
        losses = values.T.reshape(-1, *map(len, analysis.axes))
        _require_finite(analysis, at_origin(losses, analysis.axes))
        lowest, barriers = _lowest(losses), _barriers(analysis.axes, losses)
        picked = list(dict.fromkeys([*_references(analysis.axes), *lowest, *barriers]))
        again = progress.rows("picked", len(picked), num)
        yield from progress.fill("picked", _places(analysis, picked, fresh=True))
        told = _Told(analysis.axes, losses, dict(zip(picked, again, strict=True)), fresh)
        yield Landscape(
            along=str(analysis.config.along), groups=analysis.groups, axes=analysis.axes,
            counts=fresh.masks.sum(axis=1), losses=losses, origin=fresh.means(errors[0]),
            **_slopes(analysis, fresh, errors), models=_seen(analysis, fresh, errors),
            lowest=told.against_origin(lowest), barriers=told.against_line(barriers),
        )  # fmt: skip


def total_points(analysis: LandscapeAnalysis) -> int:
    """How many points are measured, at most."""
    per_group = 1 if len(analysis.axes) > 1 else 2  # on a line also the top of its barrier
    fresh = per_group * (1 + len(analysis.groups))
    return len(_probes(analysis)) + math.prod(map(len, analysis.axes)) + fresh


def _crew(analysis: LandscapeAnalysis, world: World, check: Check) -> AbstractContextManager[Crew]:
    """Who measures the places: this process, `jobs` started for it, or those of the launch."""
    field = Field(analysis.setup, analysis.examples)
    if not world.is_alone:
        return lead_launch(field, world, check)
    if analysis.config.jobs > 1:
        return open_workers(analysis.setup, check)

    def alone(places: Sequence[Place]) -> Measured:
        for number, place in enumerate(places):
            check()
            yield number, field.errors(place, check)

    return nullcontext(alone)


def _places(
    analysis: LandscapeAnalysis, indices: Sequence[Index], *, fresh: bool = False
) -> list[Place]:
    return [Place(_coordinates(analysis.axes, index), fresh=fresh) for index in indices]


def _coordinates(axes: Sequence[np.ndarray], index: Index) -> tuple[float, ...]:
    return tuple(float(axis[i]) for axis, i in zip(axes, index, strict=True))


def _probes(analysis: LandscapeAnalysis) -> list[Place]:
    """Places told in numbers: the origin, two on each axis beside it, then the other models."""
    num_axes = len(analysis.axes)
    origin, sides = (0.0,) * num_axes, []
    for number in range(num_axes):
        for side in (-1, 1):
            step = side * _stencil(analysis, number)
            sides.append(Place((*origin[:number], step, *origin[number + 1 :]), fresh=True))
    others = [Place(model=number, fresh=True) for number in range(1, len(analysis.models))]
    return [Place(origin, fresh=True), *sides, *others]


def _stencil(analysis: LandscapeAnalysis, number: int) -> float:
    return _STENCIL * float(analysis.axes[number][1] - analysis.axes[number][0])


def _require_finite(analysis: LandscapeAnalysis, origin: np.ndarray) -> None:
    for span, loss in zip(analysis.groups, origin, strict=True):
        if not np.isfinite(loss):
            raise NumericsError(
                f"{analysis.models[0].argument}: the loss of timesteps {span} is not finite; the "
                f"model's weights are broken"
            )


def _slopes(
    analysis: LandscapeAnalysis, groups: Groups, errors: np.ndarray
) -> dict[str, np.ndarray]:
    """The slopes at the origin and their steepness, by central differences.  errors: (probes, n)"""
    numbers = range(len(analysis.axes))
    per_draw = [  # (n,) each
        (errors[2 + 2 * k] - errors[1 + 2 * k]) / (2 * _stencil(analysis, k)) for k in numbers
    ]
    slopes = np.stack([groups.means(one) for one in per_draw], axis=1)  # (G, k)
    lengths = np.linalg.norm(slopes, axis=1)
    units = slopes / np.where(lengths > 0, lengths, 1)[:, None]
    along = [groups.intervals(unit @ np.array(per_draw))[g] for g, unit in enumerate(units)]
    scale = 100 / groups.means(errors[0])
    return {
        "slopes": slopes,
        "slope_intervals": np.stack([groups.intervals(one) for one in per_draw], axis=1),
        "steepness": scale * lengths,
        "steepness_intervals": scale * np.array(along),
    }


def _seen(analysis: LandscapeAnalysis, groups: Groups, errors: np.ndarray) -> list[Seen]:
    """The models where they lie, and their own losses.  errors: (probes, n)"""
    models, basis, num_axes = analysis.models, analysis.basis, len(analysis.axes)
    losses, zeros = groups.means(errors[0]), np.zeros(len(groups.masks))
    seen = [Seen(models[0].name, (0.0,) * num_axes, 0.0, losses, zeros, zeros)]
    if basis is None:
        return seen
    own = errors[len(errors) - len(models) + 1 :]
    for model, place, distance, one in zip(
        models[1:], basis.coordinates.tolist(), basis.distances.tolist(), own, strict=True
    ):
        difference = one - errors[0]
        percent, interval = (
            100 * of(difference) / losses for of in (groups.means, groups.intervals)
        )
        seen.append(Seen(model.name, tuple(place), distance, groups.means(one), percent, interval))
    return seen


def _lowest(losses: np.ndarray) -> list[Index]:
    """The lowest point of each group.  losses: (G, points, ...)"""
    shape = losses.shape[1:]
    return [tuple(map(int, np.unravel_index(np.nanargmin(one), shape))) for one in losses]


def _references(axes: Sequence[np.ndarray]) -> list[Index]:
    """What picked points are compared with: the origin, and the other end of a line."""
    origin = origin_index(axes)
    return [origin] if len(axes) > 1 else [origin, (int(np.flatnonzero(axes[0] == 1)[0]),)]


def _barriers(axes: Sequence[np.ndarray], losses: np.ndarray) -> list[Index]:
    """On a line, where each group's loss is highest over the straight line between its ends'.

    (Frankle et al. 2020; with unequal ends as Entezari et al. 2022.) Empty on a plane.
    """
    if len(axes) > 1:
        return []
    (start,), (stop,) = _references(axes)
    a = axes[0][start : stop + 1]
    height = losses[:, start : stop + 1] - np.outer(losses[:, start], 1 - a)
    height -= np.outer(losses[:, stop], a)
    height = np.where(np.isfinite(height), height, -np.inf)
    return [(start + int(np.argmax(one)),) for one in height]


@dataclass(frozen=True)
class _Told:
    """The picked points measured again.  losses: (G, points, ...)   errors: (n,) of each point"""

    axes: list[np.ndarray]
    losses: np.ndarray
    errors: dict[Index, np.ndarray]
    groups: Groups

    def against_origin(self, picked: Sequence[Index]) -> list[Pick]:
        reference = self.errors[origin_index(self.axes)]
        return [self._pick(group, index, reference) for group, index in enumerate(picked)]

    def against_line(self, picked: Sequence[Index]) -> list[Pick]:
        found = []
        for group, index in enumerate(picked):
            start, stop = (self.errors[end] for end in _references(self.axes))
            (a,) = _coordinates(self.axes, index)
            found.append(self._pick(group, index, (1 - a) * start + a * stop))
        return found

    def _pick(self, group: int, index: Index, reference: np.ndarray) -> Pick:
        difference = self.errors[index] - reference
        return Pick(
            index, _coordinates(self.axes, index), is_at_edge(index, self.axes),
            float(self.losses[(group, *index)]),
            difference=float(self.groups.means(difference)[group]),
            interval=float(self.groups.intervals(difference)[group]),
            reference=float(self.groups.means(reference)[group]),
        )  # fmt: skip
