"""One training run, told from start to end: an expert of a base, or a base from scratch.

The procedure yields a `TrainStep` now and then and leaves one artifact, and those that
`ema_lengths` and `snapshot_every` add (results.py). Beside it, hidden, lies the checkpoint from
which the same call continues; `metrics.jsonl` beside it keeps the curve. Several processes train
one expert together (data_parallel.py); the first of them writes (run_files.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.conditions import to
from deme_cli.diffusion.denoiser import TORCH_DTYPES
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import NumericsError
from deme_cli.outputs import claim
from deme_cli.processes import ALONE, JointStopRequests, World
from deme_cli.training.batches import BatchSource, derived_generator
from deme_cli.training.data_parallel import add_up_gradients, share_of
from deme_cli.training.materials import fill_caches
from deme_cli.training.objective import expert_losses
from deme_cli.training.places import checkpoint_path, metrics_path
from deme_cli.training.reduction import Reduction
from deme_cli.training.results import is_snapshot
from deme_cli.training.run import Run
from deme_cli.training.run_files import RunFiles, TrainStep
from deme_cli.training.state import TrainingState, learning_rate

_REPORT_EVERY = 10  # updates; reading a loss makes a GPU wait


def train(run: Run, world: World = ALONE) -> Iterator[TrainStep]:
    """Train `run` to its end and write its artifact, continuing from a checkpoint if one is kept.

    Raises NumericsError on a loss that is not finite (the last good checkpoint stays), Stopped
    after a signal once the state is saved, ConfigError if the kept run has other settings or
    another process writes the same output, Lost where a process of `world` has ended. Caches that
    are not full yet are filled first.
    """
    config, checkpoint = run.config, checkpoint_path(run.output)
    for _ in fill_caches(run.examples, run.held_out, world=world):
        pass
    with ExitStack() as stack:
        world.require_same({**run.identity, "output": str(run.output)})
        if world.is_first:
            stack.enter_context(claim(metrics_path(run.output)))
        requests = stack.enter_context(JointStopRequests(world))
        world.wait()  # the output is ours, and what --force drops is gone
        network, base = open_networks(run)
        reduction = Reduction(config, run.denoiser.schedule, run.clusters)
        state = TrainingState(network, reduction, config, scale_loss=run.dtype == "fp16")
        if checkpoint.exists():
            state.restore(checkpoint, run.identity, run.output)
        world.require_same({"updates done": state.step})
        files = stack.enter_context(RunFiles(run, state.step, world))
        source = open_source(run, world)
        window = _Window(network, world)
        while state.step < config.steps:
            if is_snapshot(state.step, config):  # its state is saved: a resumed run comes here too
                files.write_snapshots(state)
            for micro in range(config.accumulation):
                window.add(_backward(run, state, base, source, micro))
            requests.exchange()
            add_up_gradients([parameter for _, parameter in state.trained()], world)
            state.update()
            at_checkpoint = _is_checkpoint(state.step, config)
            if state.step % _REPORT_EVERY == 0 or at_checkpoint or state.step == config.steps:
                record = window.close(state, config)
                if at_checkpoint:
                    record = files.keep(state, record)
                files.log(record)
                yield record
            if requests.is_agreed:
                files.save(state)
                raise requests.stopped(
                    f"stopped at update {state.step} of {config.steps}; "
                    f"run the same command again to continue"
                )
        files.write_results(state, base)


def open_networks(run: Run) -> tuple[nn.Module, nn.Module | None]:
    """The network to train, with projections, and the frozen base (None when it is not needed)."""
    network = copy.deepcopy(run.denoiser.network).train().requires_grad_(True)
    if run.from_scratch:
        return network, None
    attach_projections(network, run.config.projection)
    network.to(run.denoiser.device)
    return network, run.denoiser.network


def open_source(run: Run, world: World = ALONE) -> BatchSource:
    """The batches of `run`, as far as this process shares in them."""
    return BatchSource(
        run.examples, run.choice.range, run.denoiser.schedule, run.config, flip=run.flip,
        clusters=run.clusters, share=share_of(run.config.batch_size, world),
    )  # fmt: skip


def _backward(
    run: Run, state: TrainingState, base: nn.Module | None, source: BatchSource, micro: int
) -> torch.Tensor:
    """Gradients of one batch, and its (minimised, denoising, consistency) losses.  -> (3,)

    Of a share of the batch, both are weighed by it: over the processes they add up to the batch's.
    """
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
        scale=lambda loss: state.scaler.scale(loss / (config.accumulation * source.num_shares)),
    )
    means = torch.stack([total, losses.denoising.mean(), losses.consistency.mean()])
    return means / source.num_shares


class _Window:
    """Sums the losses between two records on the device, so that the loop does not wait for it."""

    def __init__(self, network: nn.Module, world: World) -> None:
        self._zero = torch.zeros(3, device=next(network.parameters()).device)
        self._world = world
        self._open()

    def _open(self) -> None:
        self._sum, self._count, self._start = self._zero.clone(), 0, time.monotonic()

    def add(self, losses: torch.Tensor) -> None:
        self._sum += losses
        self._count += 1

    def close(self, state: TrainingState, config: FinetuneConfig) -> TrainStep:
        """The record of the window, the same in all processes.

        Raises NumericsError if its loss is not finite.
        """
        means = (self._sum / self._count).cpu()
        self._world.add_up(means)
        total, denoising, consistency = means.tolist()
        if not means.isfinite().all():
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
