"""One training run, told from start to end: an expert of a base, or a base from scratch.

The procedure yields a `TrainStep` now and then and leaves one artifact, and those that
`ema_lengths` and `snapshot_every` add (results.py). Beside it, hidden, lies the checkpoint from
which the same call continues; `metrics.jsonl` beside it keeps the curve.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.conditions import to
from deme_cli.diffusion.denoiser import TORCH_DTYPES
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import NumericsError, writing
from deme_cli.interrupts import StopRequests
from deme_cli.outputs import claim
from deme_cli.training.batches import BatchSource, derived_generator
from deme_cli.training.held_out import FixedDraws, draws_of_range
from deme_cli.training.materials import fill_caches
from deme_cli.training.objective import expert_losses
from deme_cli.training.places import checkpoint_path, metrics_path
from deme_cli.training.reduction import Reduction
from deme_cli.training.results import is_snapshot, write_results, write_snapshots
from deme_cli.training.run import Run
from deme_cli.training.state import TrainingState, learning_rate

_REPORT_EVERY = 10  # updates; reading a loss makes a GPU wait


@dataclass(frozen=True)
class TrainStep:
    """The state of the run after update `step`; losses are means since the last record."""

    step: int
    loss: float
    denoising: float
    consistency: float
    lr: float
    images_per_second: float
    held_out: float | None = None


def train(run: Run) -> Iterator[TrainStep]:
    """Train `run` to its end and write its artifact, continuing from a checkpoint if one is kept.

    Raises NumericsError on a loss that is not finite (the last good checkpoint stays), Stopped
    after a signal once the state is saved, ConfigError if the kept run has other settings or
    another process writes the same output. Caches that are not full yet are filled first.
    """
    config, checkpoint = run.config, checkpoint_path(run.output)
    for _ in fill_caches(run.examples, run.held_out):
        pass
    with ExitStack() as stack:
        stack.enter_context(claim(metrics_path(run.output)))
        requests = stack.enter_context(StopRequests())
        network, base = open_networks(run)
        reduction = Reduction(config, run.denoiser.schedule, run.clusters)
        state = TrainingState(network, reduction, config, scale_loss=run.dtype == "fp16")
        if checkpoint.exists():
            state.restore(checkpoint, run.identity, run.output)
        log = stack.enter_context(MetricsLog(run.output, state.step))
        span, schedule = run.choice.range, run.denoiser.schedule
        source = BatchSource(
            run.examples, span, schedule, config, flip=run.flip, clusters=run.clusters
        )
        held_out = draws_of_range(
            run.held_out, span, schedule, config.held_out, batch_size=config.batch_size
        )
        window = _Window(network)
        while state.step < config.steps:
            if is_snapshot(state.step, config):  # its state is saved: a resumed run comes here too
                write_snapshots(run, state)
            for micro in range(config.accumulation):
                window.add(_backward(run, state, base, source, micro))
            state.update()
            at_checkpoint = _is_checkpoint(state.step, config)
            if state.step % _REPORT_EVERY == 0 or at_checkpoint or state.step == config.steps:
                record = window.close(state, config)
                if at_checkpoint:
                    record = _keep(run, state, held_out, record)
                log.add(record)
                yield record
            if requests.asked:
                _require_finite(state)
                state.save(checkpoint, run.identity)
                raise requests.stopped(
                    f"stopped at update {state.step} of {config.steps}; "
                    f"run the same command again to continue"
                )
        _require_finite(state)
        write_results(run, state, base)
        checkpoint.unlink(missing_ok=True)


def open_networks(run: Run) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, with projections, and the frozen base (None when it is not needed)."""
    network = copy.deepcopy(run.denoiser.network).train().requires_grad_(True)
    if run.from_scratch:
        return network, None
    attach_projections(network, run.config.projection)
    network.to(run.denoiser.device)
    return network, run.denoiser.network


def _backward(
    run: Run, state: TrainingState, base: nn.Module | None, source: BatchSource, micro: int
) -> torch.Tensor:
    """Gradients of one batch, and its (minimised, denoising, consistency) losses.  -> (3,)"""
    device, half, config = run.denoiser.device, TORCH_DTYPES[run.dtype], run.config
    batch = source.batch(state.step, micro)
    t = batch.t.to(device, non_blocking=True)
    with torch.autocast(device.type, half, enabled=run.dtype != "fp32"):
        losses = expert_losses(
            state.network,
            base,
            run.denoiser.schedule,
            x0=batch.x0.to(device, non_blocking=True),
            eps=batch.eps.to(device, non_blocking=True),
            t=t,
            conditions=to(batch.conditions, device, torch.float32),
            consistency=config.consistency,
        )
    total = state.reduction.backward(
        losses.total,
        t,
        list(state.network.parameters()),
        step=state.step,
        generator=derived_generator(config.seed, source.span, state.step, micro, "order"),
        scale=lambda loss: state.scaler.scale(loss / config.accumulation),
    )
    return torch.stack([total, losses.denoising.mean(), losses.consistency.mean()])


class _Window:
    """Sums the losses between two records on the device, so that the loop does not wait for it."""

    def __init__(self, network: nn.Module) -> None:
        self._zero = torch.zeros(3, device=next(network.parameters()).device)
        self._open()

    def _open(self) -> None:
        self._sum, self._count, self._start = self._zero.clone(), 0, time.monotonic()

    def add(self, losses: torch.Tensor) -> None:
        self._sum += losses
        self._count += 1

    def close(self, state: TrainingState, config: FinetuneConfig) -> TrainStep:
        """The record of the window. Raises NumericsError if its loss is not finite."""
        total, denoising, consistency = (self._sum / self._count).tolist()
        if not torch.isfinite(self._sum).all():
            raise NumericsError(
                f"the loss became {total} by update {state.step}; only a good checkpoint is kept, "
                f"if any: lower --lr, or use --dtype bf16 or fp32, with --force to start anew"
            )
        rate = self._count * config.batch_size / max(time.monotonic() - self._start, 1e-9)
        self._open()
        lr = learning_rate(state.step - 1, config)
        return TrainStep(state.step, total, denoising, consistency, lr, rate)


def _is_checkpoint(step: int, config: FinetuneConfig) -> bool:
    """Whether the state is saved after `step` updates: also before further results are written.

    So whatever lies there when a run is cut off has a state beside it to continue from.
    """
    has_more = is_snapshot(step, config) or (config.ema_lengths and step == config.steps)
    return step % config.checkpoint_every == 0 or bool(has_more)


def _keep(
    run: Run, state: TrainingState, held_out: FixedDraws | None, record: TrainStep
) -> TrainStep:
    """Save the checkpoint; the record gains the held-out loss of the averaged weights."""
    _require_finite(state)
    state.save(checkpoint_path(run.output), run.identity)
    if held_out is None:
        return record
    value = held_out.loss(state.network, weights=state.averaged_weights())
    return TrainStep(**{**asdict(record), "held_out": value})


def _require_finite(state: TrainingState) -> None:
    if not state.is_finite():
        raise NumericsError(
            f"a weight became infinite or NaN by update {state.step}; only a good checkpoint is "
            f"kept, if any: lower --lr, with --force to start anew"
        )


class MetricsLog:
    """The curve beside the output: one TrainStep a line, cut back to where a run resumes."""

    def __init__(self, output: Path, step: int) -> None:
        self.path = metrics_path(output)
        kept = []
        if step and self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line and json.loads(line)["step"] <= step]
        with writing(self.path):
            self._file = self.path.open("w")
            self._file.writelines(f"{line}\n" for line in kept)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, record: TrainStep) -> None:
        with writing(self.path):
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
