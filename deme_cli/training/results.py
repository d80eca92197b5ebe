"""What a run leaves on disk: its result, averages of other lengths, and snapshots on the way.

Every one of them is an artifact like the result itself (an expert, or a base from scratch, folded
where the projection is `fold`), so that it can be merged, sampled and measured. The `steps` of its
record say how many updates are in it; `training` gains `step` and, for a power-function average,
`ema_length` and `ema_gamma`. Each costs a file of the base's size, each length a copy of the
weights in memory, and each snapshot a saved state. The first of several processes writes; where a
network is divided among them, all of them give it their slices.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from deme_cli.artifacts import BaseRecord, DenoiserRecord, ExpertRecord, write_artifact
from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.projection import fold_weights
from deme_cli.distributed import ALONE, World
from deme_cli.training.networks import require_unchanged
from deme_cli.training.places import variant_path
from deme_cli.training.power_profile import gamma_of
from deme_cli.training.run import Run
from deme_cli.training.sharding import gather
from deme_cli.training.state import TrainingState


def is_snapshot(step: int, config: FinetuneConfig) -> bool:
    """Whether `step` updates make a snapshot; the end does not, for it is the result."""
    every = config.snapshot_every
    return every is not None and 0 < step < config.steps and step % every == 0


def write_snapshots(run: Run, state: TrainingState, world: World = ALONE) -> None:
    """Write the run as it is now: the usual weights, and every power-function average.

    It is this run, broken off: what a run of so many `steps` would have saved, except that a
    learning rate that falls to 0 falls over the whole run. To mix averages afterwards (EDM2,
    Algorithm 3) one needs the power-function ones of several steps; to average plain checkpoints
    the usual ones serve, with `ema_decay` 0 the very weights.
    """
    for length in (None, *(run.config.ema_lengths or [])):
        _write(run, state, world, length=length, step=state.step)


def write_results(
    run: Run, state: TrainingState, base: nn.Module | None, world: World = ALONE
) -> None:
    """Write the averages of other lengths, then the result: where it lies, all of them do."""
    require_unchanged(run, base)
    for length in (*(run.config.ema_lengths or []), None):
        _write(run, state, world, length=length)


def _write(
    run: Run, state: TrainingState, world: World, *, length: float | None, step: int | None = None
) -> None:
    """Write one artifact: of the power-function average of `length`, or of the usual weights."""
    weights = gather(state.averaged_weights(length), world)
    if not world.is_first:
        return
    if run.config.projection == "fold":
        weights = fold_weights(weights, state.network)
    path = variant_path(run.output, step=step, length=length)
    averaging: dict[str, Any] = {} if path == run.output else {"step": state.step}
    if length is not None:
        averaging |= {"ema_length": length, "ema_gamma": gamma_of(length)}
    write_artifact(path, weights, _record(run, state, averaging))


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
