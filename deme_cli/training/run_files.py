"""The files of a run while it trains, written by the first process while the others wait.

Every process calls every method, and no weight that is not finite gets into a file. The held-out
loss is measured by the first process, too: it takes as long as an update or a few, once in a
thousand. Where the network is divided among them, all take part in both.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from deme_cli.diffusion.compiling import uncompiled
from deme_cli.distributed import World
from deme_cli.errors import NumericsError, writing
from deme_cli.training.held_out import FixedDraws, draws_of_range
from deme_cli.training.places import checkpoint_path, metrics_path
from deme_cli.training.results import write_results, write_snapshots
from deme_cli.training.run import Run
from deme_cli.training.sharding import holding, joint_passes
from deme_cli.training.state import TrainingState


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


class RunFiles:
    """Checkpoint, curve, snapshots and results of `run`, which goes on after update `step`."""

    def __init__(self, run: Run, step: int, world: World) -> None:
        self.run, self.world = run, world
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
        self._save(state)
        self.world.wait()

    def keep(self, state: TrainingState, record: TrainStep, *, at_once: int) -> TrainStep:
        """Save the checkpoint; the record gains the held-out loss of the averaged weights.

        at_once: the images of which a pass fits into memory.
        """
        self._save(state)
        if self._held_out is not None:
            draws = replace(self._held_out, batch_size=at_once)
            record = replace(record, held_out=self._held_out_loss(draws, state))
        self.world.wait()
        return record

    def write_snapshots(self, state: TrainingState) -> None:
        """Write the run as it is now, whose checkpoint is saved."""
        if self._writes:
            write_snapshots(self.run, state, self.world)
        self.world.wait()

    def write_results(self, state: TrainingState, base: nn.Module | None) -> None:
        """Write what the run is for, and drop its checkpoint."""
        self._require_finite(state)
        if self._writes:
            write_results(self.run, state, base, self.world)
        if self.world.is_first:
            checkpoint_path(self.run.output).unlink(missing_ok=True)
        self.world.wait()

    def _save(self, state: TrainingState) -> None:
        self._require_finite(state)
        if self._writes:
            state.save(checkpoint_path(self.run.output), self.run.identity, self.world)

    @property
    def _writes(self) -> bool:
        """Whether this process writes, or has slices of what is written."""
        return self.world.is_first or self.run.shard

    def _held_out_loss(self, draws: FixedDraws, state: TrainingState) -> float:
        """Of the averaged weights; a divided network is asked by all processes, for the same."""
        weights = state.averaged_weights()
        if self.run.shard:
            with holding(state.network, weights), joint_passes(self.world):
                return draws.loss(state.network)
        with uncompiled(state.network):  # other weights and batches than it was compiled for
            return draws.loss(state.network, weights=weights)

    def _require_finite(self, state: TrainingState) -> None:
        if self.world.largest(int(not state.is_finite())):
            raise NumericsError(
                f"a weight became infinite or NaN by update {state.step}; only a good checkpoint "
                f"is kept, if any: lower --lr, with --force to start anew"
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
