"""The files of a run: its checkpoint, its curve, its result, averages of other lengths, snapshots.

Every result is an artifact like the main one (an expert, or a base from scratch, folded where the
projection is `fold`), so that it can be merged, sampled and measured. The `steps` of its record say
how many updates are in it; `training` gains `step` and, for a power-function average, `ema_length`
and `ema_gamma`. Each costs a file of the base's size, each length a copy of the weights in memory,
and each snapshot a saved state.

The first of several processes writes while the others wait: every process calls every method, and
no weight that is not finite gets into a file. The held-out loss is measured by the first one, too:
it takes as long as an update or a few, once in a thousand. Where the network is divided among them,
all take part in both.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deme_cli.artifacts import BaseRecord, DenoiserRecord, ExpertRecord, write_artifact
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.compiling import uncompiled
from deme_cli.diffusion.projection import fold_weights
from deme_cli.distributed import World
from deme_cli.errors import NumericsError, writing
from deme_cli.training.gradients import Gradients
from deme_cli.training.held_out import FixedDraws, draws_of_range
from deme_cli.training.power_profile import gamma_of
from deme_cli.training.setup import Run, checkpoint_path, metrics_path, variant_path
from deme_cli.training.sharding import gather, holding, joint_passes
from deme_cli.training.state import TrainingState, learning_rate


@dataclass(frozen=True)
class TrainStep:
    """The state of the run after update `step`; losses are means since the last record.

    halved_to: where memory ran out since then, how many images go through the network at a time
    from now on, in the process that takes fewest.
    """

    step: int
    loss: float
    denoising: float
    consistency: float
    lr: float
    images_per_second: float
    held_out: float | None = None
    halved_to: int | None = None


class LossWindow:
    """Sums the losses between two records on the device, so that the loop does not wait for it."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self._at_once = gradients, gradients.at_once
        self._open()

    def _open(self) -> None:
        self._sum = torch.zeros(3, device=self._gradients.state.device)
        self._count, self._start = 0, time.monotonic()

    def add(self, losses: Tensor) -> None:
        self._sum += losses
        self._count += 1

    def close(self) -> TrainStep:
        """The record of the window, the same in all processes.

        Raises NumericsError if its loss is not finite.
        """
        world, config = self._gradients.world, self._gradients.run.config
        step = self._gradients.state.step
        means = (self._sum / self._count).cpu()
        world.add_up(means)
        total, denoising, consistency = means.tolist()
        if not means.isfinite().all():
            raise NumericsError(
                f"the loss became {total} by update {step}; only a good checkpoint is kept, "
                f"if any: lower --lr, or use --dtype bf16 or fp32, with --force to start anew"
            )
        rate = self._count * config.batch_size / max(time.monotonic() - self._start, 1e-9)
        self._open()
        lr, halved_to = learning_rate(step - 1, config), self._halved_to()
        return TrainStep(step, total, denoising, consistency, lr, rate, halved_to=halved_to)

    def _halved_to(self) -> int | None:
        """`at_once` of the process that takes fewest images, where it has fallen."""
        at_once = -self._gradients.world.largest(-self._gradients.at_once)
        before, self._at_once = self._at_once, at_once
        return at_once if at_once < before else None


def is_snapshot(step: int, config: FinetuneConfig) -> bool:
    """Whether `step` updates make a snapshot; the end does not, for it is the result."""
    every = config.snapshot_every
    return every is not None and 0 < step < config.steps and step % every == 0


def is_checkpoint(step: int, config: FinetuneConfig) -> bool:
    """Whether the state is saved after `step` updates: also before further results are written.

    So whatever lies there when a run is cut off has a state beside it to continue from.
    """
    has_more = is_snapshot(step, config) or (config.ema_lengths and step == config.steps)
    return step % config.checkpoint_every == 0 or bool(has_more)


class RunFiles:
    """Checkpoint, curve, snapshots and results of `run`, which goes on after update `step`."""

    def __init__(self, run: Run, step: int, world: World) -> None:
        self.run, self.world = run, world
        self._writes = world.is_first or run.shard  # or has slices of what is written
        self._curve = MetricsLog(run.output, step) if world.is_first else None
        self._held_out: FixedDraws | None = None
        if run.held_out is not None and self._writes:
            self._held_out = draws_of_range(
                run.held_out, run.choice.range, run.denoiser.schedule, run.config.held_out
            )

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, *error: object) -> None:
        if self._curve:
            self._curve.close()

    def log(self, record: TrainStep) -> None:
        """Add a point to the curve."""
        if self._curve:
            self._curve.add(record)

    def save(self, state: TrainingState) -> None:
        """Save the checkpoint."""
        self._require_finite(state)
        if self._writes:
            state.save(checkpoint_path(self.run.output), self.run.identity, self.world)
        self.world.wait()

    def keep(self, state: TrainingState, record: TrainStep, *, at_once: int) -> TrainStep:
        """Save the checkpoint; the record gains the held-out loss of the averaged weights.

        at_once: the images of which a pass fits into memory.
        """
        self.save(state)
        if self._held_out is not None:
            draws = replace(self._held_out, batch_size=at_once)
            record = replace(record, held_out=self._held_out_loss(draws, state))
        self.world.wait()
        return record

    def write_snapshots(self, state: TrainingState) -> None:
        """Write the run as it is now, whose checkpoint is saved: the usual weights, every average.

        It is this run, broken off: what a run of so many `steps` would have saved, except that a
        learning rate that falls to 0 falls over the whole run. To mix averages afterwards (EDM2,
        Algorithm 3) one needs the power-function ones of several steps; to average plain
        checkpoints the usual ones serve, with `ema_decay` 0 the very weights.
        """
        if self._writes:
            for length in (None, *(self.run.config.ema_lengths or [])):
                self._write(state, length, step=state.step)
        self.world.wait()

    def write_results(self, state: TrainingState) -> None:
        """Write the averages of other lengths, then the result: where it lies, all of them do."""
        self._require_finite(state)
        if self._writes:
            for length in (*(self.run.config.ema_lengths or []), None):
                self._write(state, length)
        if self.world.is_first:
            checkpoint_path(self.run.output).unlink(missing_ok=True)
        self.world.wait()

    def _write(self, state: TrainingState, length: float | None, step: int | None = None) -> None:
        """Write one artifact: the power-function average of `length`, or the usual weights."""
        run = self.run
        weights = gather(state.averaged_weights(length), self.world)
        if not self.world.is_first:
            return
        if run.config.projection == "fold":
            weights = fold_weights(weights, state.network)
        path = variant_path(run.output, step=step, length=length)
        averaging: dict[str, Any] = {} if path == run.output else {"step": state.step}
        if length is not None:
            averaging |= {"ema_length": length, "ema_gamma": gamma_of(length)}
        write_artifact(path, weights, _record(run, state, averaging))

    def _held_out_loss(self, draws: FixedDraws, state: TrainingState) -> float:
        """Of the averaged weights; a divided network is asked by all processes, for the same."""
        joint = joint_passes(self.world) if self.run.shard else nullcontext()
        network = state.network  # compiled for other batches
        with holding(network, state.averaged_weights()), uncompiled(network), joint:
            return draws.loss(network)

    def _require_finite(self, state: TrainingState) -> None:
        if self.world.largest(int(not state.is_finite())):
            raise NumericsError(
                f"a weight became infinite or NaN by update {state.step}; only a good checkpoint "
                f"is kept, if any: lower --lr, with --force to start anew"
            )


def _record(run: Run, state: TrainingState, averaging: dict[str, Any]) -> DenoiserRecord:
    """The header of a result: every setting that is set, and what was averaged how."""
    config, record, examples = run.config, run.denoiser.record, run.examples
    model: dict[str, Any] = {
        "source": record.source,
        "model_config": record.model_config,
        "scheduler_config": record.scheduler_config,
        "num_train_timesteps": record.num_train_timesteps,
        "companions": record.companions,
    }
    data = {"source": examples.source, "fingerprint": examples.fingerprint, "num": len(examples)}
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    settings |= {"dtype": run.dtype, "flip": run.flip, "crop": examples.crop}
    settings |= {"resolution": list(examples.image_shape[1:]), **averaging}
    if run.clusters:
        settings["cluster_ranges"] = [str(cluster) for cluster in run.clusters]
    if run.from_scratch:
        return BaseRecord(**model, training={**settings, "data": data})
    return ExpertRecord(
        **model,
        range=[run.choice.range.start, run.choice.range.stop],
        index=run.choice.index,
        of=run.choice.of,
        base=record.fingerprint,
        p=config.p,
        steps=state.step,
        seed=config.seed,
        projection=config.projection,
        data=data,
        training=settings,
    )


class MetricsLog:
    """The curve beside the output: one TrainStep a line, cut back to where a run resumes."""

    def __init__(self, output: Path, step: int) -> None:
        self.path = metrics_path(output)
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        with writing(self.path):
            self._file = self.path.open("w")
            self._file.writelines(f"{line}\n" for line in kept)

    def add(self, record: TrainStep) -> None:
        """Write a line, and let it reach those who watch."""
        with writing(self.path):
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The update of a line; infinite for one that was being written when its run was killed."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
