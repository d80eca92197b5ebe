"""Trajectories found: their distances and pictures, as JSON and in a sentence.

S steps, n images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deme_cli.analysis.document import document_bytes
from deme_cli.evaluation.row_plans import ENSEMBLE
from deme_cli.timesteps import TimestepRange

PLAIN = 25.5  # levels of 255 between images that plainly differ: a PSNR of 20 dB


@dataclass(frozen=True)
class Trace:
    """One model's way: who acted in each step (S,), predicted x_0, and the images it ends in."""

    acted: np.ndarray  # int64 (S,)
    x0: np.ndarray  # float32 (S, n, C, h, w)
    images: np.ndarray  # uint8 (n, H, W, C)


@dataclass(frozen=True)
class Distance:
    """Root mean square over pixels and channels between two models, image by image."""

    steps: np.ndarray  # (S, n) of predicted x_0, in the unit of the trajectories
    final: np.ndarray  # (n,) of the images at the end, in levels of 255


@dataclass(frozen=True)
class Trajectory:
    """Of one model: who acted when, its pictures, and its distance to each reference by name."""

    name: str
    kind: str
    span: TimestepRange | None  # that an expert was finetuned on
    experts: list[tuple[TimestepRange, str]]
    acted: list[int]  # index into experts, of S steps
    pictures: np.ndarray  # uint8 (rows, columns + 1, H', W', C), the final image last
    distances: dict[str, Distance]


@dataclass(frozen=True)
class Trajectories:
    """All of them over the same S steps, at `times` of [0, T)."""

    times: list[float]
    num_train_timesteps: int
    columns: list[int]  # which steps are shown
    in_latents: bool
    num: int
    trajectories: list[Trajectory]

    @property
    def unit(self) -> str:
        """What predicted x_0 is measured in."""
        return "latent units" if self.in_latents else "levels of 255"

    @property
    def references(self) -> list[str]:
        return list(self.trajectories[0].distances)

    def of_kind(self, kind: str) -> Trajectory | None:
        return next((one for one in self.trajectories if one.kind == kind), None)

    def nearest(self, one: Trajectory, reference: str) -> int:
        """The step whose predicted x_0 are nearest to the reference's, in the mean over images.

        At high noise they differ because errors of eps are large ones of x_0, later because the
        ways have parted.
        """
        return int(one.distances[reference].steps.mean(axis=1).argmin())


def distance_between(one: Trace, other: Trace, *, in_latents: bool) -> Distance:
    """How far two models are apart, step by step and at the end.

    Pixels of x_0 count as an image shows them: clipped to [-1, 1], in levels of 255.
    """

    def shown(x0: np.ndarray) -> np.ndarray:
        return x0 if in_latents else x0.clip(-1, 1) * np.float32(127.5)

    steps = [_rms(shown(a), shown(b)) for a, b in zip(one.x0, other.x0, strict=True)]
    return Distance(np.stack(steps), _rms(one.images, other.images))


def _rms(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Root mean square per image.  (n, ...), (n, ...) -> (n,) float64"""
    squares = (images.astype(np.float64) - others) ** 2
    return np.sqrt(squares.mean(axis=tuple(range(1, images.ndim))))


def document_of(found: Trajectories, protocol: dict[str, Any]) -> bytes:
    """The file: what was measured, a row per model, lists by step in the order of `t`."""
    models = [
        {
            "name": one.name,
            "kind": one.kind,
            "range": None if one.span is None else str(one.span),
            "experts": [{"range": str(span), "name": name} for span, name in one.experts],
            "acted": one.acted,
            "distances": {name: _row(found, one, name) for name in one.distances},
        }
        for one in found.trajectories
    ]
    return document_bytes(
        "trajectory", read_trajectories(found), protocol, unit=found.unit, t=found.times,
        shown=found.columns, models=models,
    )  # fmt: skip


def foot_of(protocol: dict[str, Any]) -> str:
    """How it was drawn, in a line under the picture."""
    told = [f"{protocol['sampler']}, {protocol['steps']} steps"]
    told += [f"{protocol['spacing']} spacing"] if protocol["spacing"] else []
    told += [f"eta {protocol['eta']:g}"] if protocol["eta"] else []
    told += [f"guidance {protocol['guidance']:g}"] if protocol["guidance"] is not None else []
    told += [f"seed {protocol['seed']}"]
    if len(protocol["models"]) == 1:
        return ", ".join(told)
    foot = f"{', '.join(told)}; curves: means over {protocol['num']} images ± one standard error"
    if protocol["prediction_type"] == "epsilon":
        foot += "\n(at high noise a small difference in eps is a large one in $x_0$)"
    return foot


def _row(found: Trajectories, one: Trajectory, reference: str) -> dict[str, Any]:
    distance = one.distances[reference]
    return {
        "mean": _rounded(distance.steps.mean(axis=1)),
        "sd": _rounded(_sd(distance.steps)),
        "nearest_t": found.times[found.nearest(one, reference)],
        "final_mean": float(distance.final.mean()),
        "final_sd": float(_sd(distance.final)),
        "final": _rounded(distance.final),
        "final_differs": _num_different(distance),
    }


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over images (the last axis); nan for one image."""
    return _sd(values) / math.sqrt(values.shape[-1])


def _mean(values: np.ndarray) -> str:
    """The mean over images with its standard error. Final distances are of two kinds, those of
    images that stay and of images that become others, so that few images tell little."""
    error = float(standard_error(values))
    return f"{values.mean():.1f}" + (f" ± {error:.1f}" if math.isfinite(error) else "")


def _num_different(distance: Distance) -> int:
    """How many images end plainly different."""
    return int((distance.final > PLAIN).sum())


def _sd(values: np.ndarray) -> np.ndarray:
    """Standard deviation over images; of one image there is none."""
    alone = values.shape[-1] == 1
    return np.full(values.shape[:-1], math.nan) if alone else values.std(axis=-1, ddof=1)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def read_trajectories(found: Trajectories) -> str:
    """In a sentence: where models part, and whom merged ends nearer to."""
    if not found.references:
        return (
            f"{found.trajectories[0].name} alone: {found.num} images in {len(found.times)} steps; "
            f"name more models to see where they part"
        )
    start = found.references[0]
    ensemble, merged = found.of_kind(ENSEMBLE), found.of_kind("merged")
    leaders = [one for one in (ensemble or merged,) if one is not None and one.name != start]
    leaders = leaders or [one for one in found.trajectories if one.name != start]
    parts = [_parting(found, one, start) for one in leaders]
    if ensemble is not None and merged is not None:
        parts.append(_nearness(merged, ensemble.name, start))
    return "; ".join(parts)


def _parting(found: Trajectories, one: Trajectory, start: str) -> str:
    """Where one leaves the base's way, and how far from it it ends."""
    distance, step = one.distances[start], found.nearest(one, start)
    means, last = distance.steps.mean(axis=1), len(found.times) - 1
    if not means.any():
        return f"{one.name} and {start} predict the same x_0 in every step"
    acting = one.experts[one.acted[min(step + 1, last)]][1]
    by = f", where {acting} acts" if one.kind == ENSEMBLE and step < last else ""
    then = "come nearest in the last step" if step == last else f"part after it{by}"
    many = _num_different(distance)
    return (
        f"{one.name} and {start} predict most alike at t = {found.times[step]:.4g} "
        f"(RMS {means[step]:.3g} {found.unit}) and {then}; they end {_mean(distance.final)} "
        f"levels of 255 apart ({many} of {found.num} images plainly different)"
    )


def _nearness(merged: Trajectory, ensemble: str, start: str) -> str:
    """Whether merged ends nearer to the ensemble or to the base, image by image."""
    near, far = merged.distances[ensemble].final, merged.distances[start].final
    ends = f"{merged.name} ends {_mean(near)} from {ensemble}"
    if ensemble == start:
        return ends
    nearer = int((near < far).sum())
    return (
        f"{ends} and {_mean(far)} from {start} (nearer to {ensemble} in {nearer} of {len(near)} "
        f"images)"
    )
