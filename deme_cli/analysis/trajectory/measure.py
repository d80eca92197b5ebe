"""The same noise denoised by each model: what each step predicts of x_0, where they part.

At each step the network's output implies an x_0 (schedule.x0_of). Models start from the same noise
and draw the same fresh noise, so two of these differ by the models alone: by what they say of this
x_t, and by how far their x_t have parted before. S steps measured, n images, C channels, h x w
pixels of latents, H x W of images; a model that draws pixels has images for latents.

x_0 of pixels is compared as an image shows it: clipped to [-1, 1], in levels of 255. Latents are
compared as they are, in their own units, and decoded only where they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deme_cli.analysis.lineup import Entrant
from deme_cli.analysis.trajectory.found import (
    Distance,
    Trace,
    Trajectories,
    Trajectory,
    distance_between,
)
from deme_cli.analysis.unfinished import Step, Unfinished, unfinished_path
from deme_cli.analysis_config import TrajectoryConfig
from deme_cli.config import SampleConfig
from deme_cli.data.prompts import PromptSet
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ArtifactError
from deme_cli.evaluation.row_plans import ENSEMBLE
from deme_cli.outputs import require_space
from deme_cli.sampling.finish import finish_images
from deme_cli.sampling.protocol import protocol_card
from deme_cli.sampling.sampler import Forward, ImageBatch, StepProgress, sample_images
from deme_cli.sampling.scene import Scene, open_scene
from deme_cli.sampling.scheduler import build_scheduler, name_sampler

MOST_STEPS = 100  # whose x_0 are kept and compared; a sampler of more has them evenly
_OF_A_MODEL = ("model", "source", "fingerprints", "ranges")  # in a protocol card
_THUMB = 160  # pixels per side of the images shown, at most


@dataclass(frozen=True)
class TrajectoryAnalysis:
    """What is measured, opened. `config` names its sampler and number of images, as the scene."""

    entrants: Sequence[Entrant]
    scene: Scene
    config: SampleConfig
    settings: TrajectoryConfig
    protocol: dict[str, Any]  # what images depend on besides the model
    output: Path

    @property
    def num(self) -> int:
        return self.scene.num

    @property
    def total(self) -> int:
        """Images to be denoised, of all models."""
        return len(self.entrants) * self.num

    @cached_property
    def timesteps(self) -> list[float]:
        """The sampler's own step list."""
        scene = self.scene
        scheduler = build_scheduler(
            self.entrants[0].records[0].scheduler_config, self.config,
            lay_out=scene.lay_out, has_latents=scene.has_latents,
        )  # fmt: skip
        return scheduler.timesteps.tolist()

    @cached_property
    def steps(self) -> list[int]:
        """The S steps that are compared, by their place in the step list."""
        return steps_of(self.timesteps)

    @property
    def columns(self) -> list[int]:
        """Which of the S steps are shown."""
        return spread(len(self.steps), self.settings.shown)

    @property
    def references(self) -> list[int]:
        """Whom all are compared with: the base, else the first, and the first ensemble."""
        kinds = [entrant.kind for entrant in self.entrants]
        found = [kinds.index("base") if "base" in kinds else 0]
        found += [kinds.index(ENSEMBLE)] if ENSEMBLE in kinds else []
        return list(dict.fromkeys(found))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: finished models are used again only if all of it agrees."""
        return {
            "models": [[entrant.name, *entrant.fingerprints] for entrant in self.entrants],
            "protocol": self.protocol,
            "shown": self.settings.shown,
            "rows": self.settings.rows,
        }


def open_trajectories(
    entrants: Sequence[Entrant], config: SampleConfig, settings: TrajectoryConfig, output: Path, *,
    prompts: PromptSet | None = None, pipeline: str | None = None, device: str = "cpu",
    dtype: str = "fp32",
) -> TrajectoryAnalysis:  # fmt: skip
    """The line-up in one scene. Raises what `open_scene` and `build_scheduler` raise.

    ArtifactError where two models have other frozen parts or are told other things of an image.
    """
    first = entrants[0]
    for entrant in entrants[1:]:
        for what, own, other in zip(
            ("set of frozen parts", "kind of conditions"),
            _surroundings(first), _surroundings(entrant), strict=True,
        ):  # fmt: skip
            if own != other:
                raise ArtifactError(
                    f"{entrant.name}: another {what} than {first.name}; compare models of one base"
                )
    scene = open_scene(
        first.records, config, prompts=prompts, pipeline=pipeline, device=device, dtype=dtype
    )
    config = name_sampler(first.records[0].scheduler_config, replace(config, num=scene.num))
    card = protocol_card(first.records, config, scene=scene, dtype=dtype)
    protocol = {name: value for name, value in card.items() if name not in _OF_A_MODEL}
    return TrajectoryAnalysis(entrants, scene, config, settings, protocol, output)


def _surroundings(entrant: Entrant) -> tuple[dict[str, Any], dict[str, Any]]:
    record = entrant.records[0]
    told = backbone_of(record.model_config).condition_shapes(record.model_config)
    return dict(record.companions), dict(told)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly, the ends among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def steps_of(timesteps: Sequence[float]) -> list[int]:
    """At most MOST_STEPS places of a step list, evenly.

    Where a sampler asks more than once at a t (heun, pndm), the last: from the x_t that it keeps.
    """
    following = [*timesteps[1:], None]
    kept = [i for i, pair in enumerate(zip(timesteps, following, strict=True)) if len({*pair}) > 1]
    return [kept[place] for place in spread(len(kept), MOST_STEPS)]


def measure_trajectories(
    analysis: TrajectoryAnalysis, *, force: bool = False
) -> Generator[Step | Trajectories]:
    """Denoise with every model; yields a `Step` per forward, and the `Trajectories` last.

    Finished models are kept beside the output until the caller discards them, and used again unless
    `force`. Raises MissingError without room for them, NumericsError on images that are not finite,
    Stopped after a signal.
    """
    references, every = analysis.references, range(len(analysis.entrants))
    order = [*references, *(index for index in every if index not in references)]
    size = 4 * len(analysis.steps) * analysis.num * math.prod(analysis.scene.latent_shape)
    require_space(unfinished_path(analysis.output), len(references) * size)
    with Unfinished(analysis.output, analysis.identity, force=force) as kept:
        first = sum(f"{index} pictures" in kept.arrays for index in every)
        note = f"continuing after {first} of {len(order)} models" if first else kept.note
        yield Step(first * analysis.num, note)
        for place, index in enumerate(order[first:], first):
            kept.done = f"{place} of {len(order)} models"
            for record in trace(analysis, analysis.entrants[index]):
                kept.check()
                if isinstance(record, Trace):
                    kept.arrays |= _kept(analysis, index, record, kept.arrays)
                else:
                    done = place * analysis.num + record.done * analysis.num // record.total
                    yield Step(done)
            kept.save_now_and_then()
        yield _conclude(analysis, kept.arrays)


def trace(analysis: TrajectoryAnalysis, entrant: Entrant) -> Iterator[StepProgress | Trace]:
    """One model's way from noise to image, as `deme sample` goes it: progress, then the `Trace`."""
    scene, num = analysis.scene, analysis.num
    schedule = read_schedule(entrant.records[0].scheduler_config)
    places = {step: place for place, step in enumerate(analysis.steps)}
    acted = np.zeros(len(places), np.int64)
    x0 = np.zeros((len(places), num, *scene.latent_shape), np.float32)

    def watch(forward: Forward) -> None:
        place = places.get(forward.step)
        if place is not None:
            acted[place] = forward.expert
            implied = schedule.x0_of(forward.output, forward.x_t, forward.t)
            x0[place, forward.start : forward.start + len(implied)] = implied.cpu().numpy()

    images = []
    for record in sample_images(
        entrant.experts, analysis.config, scene=scene, hold_one=True, watch=watch
    ):
        if isinstance(record, ImageBatch):
            images.append(record.images)
        else:
            yield record
    yield Trace(acted, x0, np.concatenate(images))


def _kept(
    analysis: TrajectoryAnalysis, index: int, found: Trace, before: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What stays of a trace: all of it of a reference, of others how far from each they went."""
    rows = range(min(analysis.settings.rows, analysis.num))
    pictures = [_pictures(analysis, found, row) for row in rows]
    kept = {f"{index} acted": found.acted, f"{index} pictures": np.stack(pictures)}
    if index in analysis.references:
        return kept | {f"{index} x0": found.x0, f"{index} images": found.images}
    for other in analysis.references:
        distance = distance_between(
            found, _trace_of(before, other), in_latents=analysis.scene.has_latents
        )
        kept |= {f"{index} to {other}": distance.steps, f"{index} end to {other}": distance.final}
    return kept


def _trace_of(kept: dict[str, np.ndarray], index: int) -> Trace:
    return Trace(kept[f"{index} acted"], kept[f"{index} x0"], kept[f"{index} images"])


def _pictures(analysis: TrajectoryAnalysis, found: Trace, row: int) -> np.ndarray:
    """Predicted x_0 of image `row` at the steps shown, and the image.  (columns + 1, H', W', C)"""
    x0 = torch.from_numpy(found.x0[analysis.columns, row])
    predicted = finish_images(x0, analysis.scene, analysis.config, first=row)
    images = torch.from_numpy(np.concatenate([predicted, found.images[row : row + 1]]))
    return _reduced(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous().numpy()


def _reduced(images: Tensor) -> Tensor:
    """Large images to at most _THUMB pixels per side, by means of squares.  uint8 (B, C, H, W)"""
    side = math.ceil(max(images.shape[2:]) / _THUMB)
    if side == 1:
        return images
    return functional.avg_pool2d(images.float(), side, ceil_mode=True).round().to(torch.uint8)


def _conclude(analysis: TrajectoryAnalysis, kept: dict[str, np.ndarray]) -> Trajectories:
    """What was kept of all models, side by side, in the order of the line-up."""
    record = analysis.entrants[0].records[0]
    return Trajectories(
        [analysis.timesteps[step] for step in analysis.steps],
        record.num_train_timesteps,
        analysis.columns,
        analysis.scene.has_latents,
        analysis.num,
        [_trajectory(analysis, index, kept) for index in range(len(analysis.entrants))],
    )


def _trajectory(
    analysis: TrajectoryAnalysis, index: int, kept: dict[str, np.ndarray]
) -> Trajectory:
    entrant, distances = analysis.entrants[index], {}
    for other in analysis.references if len(analysis.entrants) > 1 else []:
        if index in analysis.references:
            found = distance_between(
                _trace_of(kept, index),
                _trace_of(kept, other),
                in_latents=analysis.scene.has_latents,
            )
        else:
            found = Distance(kept[f"{index} to {other}"], kept[f"{index} end to {other}"])
        distances[analysis.entrants[other].name] = found
    names = entrant.members or [entrant.name]
    return Trajectory(
        entrant.name,
        entrant.kind,
        entrant.span,
        [(expert.range, name) for expert, name in zip(entrant.experts, names, strict=True)],
        kept[f"{index} acted"].tolist(),
        kept[f"{index} pictures"],
        distances,
    )
