"""One training run, told from start to end: an expert of a base, or a base from scratch.

The procedure yields a `TrainStep` now and then and leaves one artifact, and those that
`ema_lengths` and `snapshot_every` add (results.py). Beside it, hidden, lies the checkpoint from
which the same call continues; `metrics.jsonl` beside it keeps the curve. Several processes train
one expert together (data_parallel.py); the first of them writes (run_files.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.compiling import compile_network
from deme_cli.diffusion.threads import using_threads
from deme_cli.distributed import ALONE, JointStopRequests, World
from deme_cli.errors import NumericsError, memory_told
from deme_cli.jobs import claim
from deme_cli.training.data_parallel import add_up_gradients
from deme_cli.training.gradients import Gradients, too_many_weights
from deme_cli.training.materials import fill_caches
from deme_cli.training.networks import fitting_threads, for_precision, open_networks
from deme_cli.training.places import checkpoint_path, metrics_path
from deme_cli.training.prefetch import open_batches
from deme_cli.training.reduction import Reduction
from deme_cli.training.results import is_snapshot
from deme_cli.training.run import Run
from deme_cli.training.run_files import RunFiles, TrainStep
from deme_cli.training.sharding import shard
from deme_cli.training.state import TrainingState, learning_rate

_REPORT_EVERY = 10  # updates; reading a loss makes a GPU wait


def train(run: Run, world: World = ALONE) -> Iterator[TrainStep]:
    """Train `run` to its end and write its artifact, continuing from a checkpoint if one is kept.

    Raises NumericsError on a loss that is not finite (the last good checkpoint stays), Stopped
    after a signal once the state is saved, ConfigError if the kept run has other settings or
    another process writes the same output, Lost where a process of `world` has ended. Caches that
    are not full yet are filled first.
    """
    config = run.config
    for _ in fill_caches(run.examples, run.held_out, world=world):
        pass
    with ExitStack() as stack:
        world.require_same({**run.identity, "output": str(run.output), "shard": run.shard})
        if world.is_first:
            stack.enter_context(claim(metrics_path(run.output)))
        requests = JointStopRequests(world)
        stack.enter_context(requests)
        world.wait()  # the output is ours, and what --force drops is gone
        stack.enter_context(using_threads(fitting_threads(run)))
        with memory_told(too_many_weights(run)):
            state, base = open_state(run, world)
        world.require_same({"updates done": state.step})
        files = stack.enter_context(RunFiles(run, state.step, world))
        source = stack.enter_context(open_batches(run, world, state.device))
        compile_networks(run, [state.network, base], state.step)
        gradients = Gradients(run, state, base, source, world)
        window = _Window(gradients)
        while state.step < config.steps:
            if is_snapshot(state.step, config):  # its state is saved: a resumed run comes here too
                files.write_snapshots(state)
            for losses in gradients.of_update():
                window.add(losses)
            requests.exchange()
            with memory_told(too_many_weights(run)):
                add_up_gradients([parameter for _, parameter in state.trained()], world)
                state.update()
            at_checkpoint = _is_checkpoint(state.step, config)
            if state.step % _REPORT_EVERY == 0 or at_checkpoint or state.step == config.steps:
                record = window.close()
                if at_checkpoint:
                    record = files.keep(state, record, at_once=gradients.at_once)
                files.log(record)
                yield record
            if requests.is_agreed:
                files.save(state)
                raise requests.stopped(
                    f"stopped at update {state.step} of {config.steps}; "
                    f"run the same command again to continue"
                )
        files.write_results(state, base)


def open_state(run: Run, world: World) -> tuple[TrainingState, nn.Module | None]:
    """What is trained, as it is at the start or in the checkpoint that is kept; the frozen base."""
    network, base = for_precision(run, *open_networks(run))
    if run.shard:
        for one in (network, base) if base is not None else (network,):
            shard(one, world)
    reduction = Reduction(run.config, run.denoiser.schedule, run.clusters)
    state = TrainingState(network, reduction, run.config, scale_loss=run.dtype == "fp16")
    if (checkpoint := checkpoint_path(run.output)).exists():
        state.restore(checkpoint, run.identity, run.output)
    return state, base


def compile_networks(run: Run, networks: Sequence[nn.Module | None], step: int) -> None:
    """Compile what the updates from `step` on will run, where `run.compile` asks for it."""
    if run.shard:  # gathering its blocks would break what is compiled into pieces
        return
    num_forwards = (run.config.steps - step) * run.config.accumulation
    for network in networks:
        if network is not None:
            compile_network(network, run.compile, num_forwards=num_forwards)


class _Window:
    """Sums the losses between two records on the device, so that the loop does not wait for it."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self._at_once = gradients, gradients.at_once
        self._zero = torch.zeros(3, device=gradients.state.device)
        self._open()

    def _open(self) -> None:
        self._sum, self._count, self._start = self._zero.clone(), 0, time.monotonic()

    def add(self, losses: torch.Tensor) -> None:
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


def _is_checkpoint(step: int, config: FinetuneConfig) -> bool:
    """Whether the state is saved after `step` updates: also before further results are written.

    So whatever lies there when a run is cut off has a state beside it to continue from.
    """
    has_more = is_snapshot(step, config) or (config.ema_lengths and step == config.steps)
    return step % config.checkpoint_every == 0 or bool(has_more)
