"""One training run from start to end: updates, a record now and then, and the files it leaves.

B images of a batch over the whole launch. The gradient is that of the mean over B whatever part of
a batch goes through the network at a time: every part is weighed by its share of B. Where memory
runs out, the parts are halved and the update begins anew; nothing of it was applied yet. Each
process does so for itself, for they meet when their gradients are there; where the network is
divided among them, whose passes they make together, it ends the run.

Every result is an artifact like the main one (an expert, or a base from scratch, folded where the
projection is `fold`), so that it can be merged, sampled and measured. The `steps` of its record say
how many updates are in it; `training` gains `step` and, for a power-function average, `ema_length`
and `ema_gamma`. The first of several processes writes while the others wait, and no weight that is
not finite gets into a file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deme_cli.artifacts import BaseRecord, DenoiserRecord, ExpertRecord, write_artifact
from deme_cli.diffusion.adapters import adapter_tensors
from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import TORCH_DTYPES, stored_in
from deme_cli.diffusion.execution import (
    compile_network,
    fitting_number,
    uncompiled,
    using_threads,
)
from deme_cli.diffusion.projection import fold_weights
from deme_cli.diffusion.schedule import FlowSchedule
from deme_cli.distributed import ALONE, JointStopRequests, World
from deme_cli.errors import (
    MissingError,
    NumericsError,
    is_out_of_memory,
    out_of_memory_as,
    writing,
)
from deme_cli.files import write_whole
from deme_cli.jobs import claim
from deme_cli.training.batches import Draw, derived_generator, draws_of_range, open_batches
from deme_cli.training.examples import fill_caches
from deme_cli.training.objective import expert_losses
from deme_cli.training.power_profile import gamma_of
from deme_cli.training.setup import Run, checkpoint_path, metrics_path, snapshot_steps, variant_path
from deme_cli.training.sharding import add_up_gradients, gather, holding, joint_passes
from deme_cli.training.state import TrainingState, learning_rate, open_state
from deme_cli.training.trackers import tracking

_REPORT_EVERY = 10  # batches; reading a loss makes a GPU wait


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


def train(run: Run, world: World = ALONE) -> Iterator[TrainStep]:
    """Train `run` to its end and write its artifact, continuing from a checkpoint if one is kept.

    Raises NumericsError on a loss that is not finite (the last good checkpoint stays), Stopped
    after a signal once the state is saved, ConfigError if the kept run has other settings or
    another process writes the same output, Lost where a process of `world` has ended. Caches that
    are not full yet are filled first.
    """
    config, snapshots = run.config, snapshot_steps(run.config)
    report_every = math.ceil(_REPORT_EVERY / config.accumulation)
    too_many_weights = (
        f"{run.denoiser.record.origin}: the weights with their moments and averages do not fit "
        f"into the device's memory; use fewer --ema-lengths, divide the network among more "
        f"processes with --shard, or use a device with more memory"
    )
    fill_caches(run.examples, run.held_out, world=world)
    with ExitStack() as stack:
        world.require_same({**run.identity, "output": str(run.output), "shard": run.shard})
        if world.is_first:
            stack.enter_context(claim(metrics_path(run.output)))
        requests = stack.enter_context(JointStopRequests(world))
        world.wait()  # the output is ours, and what --force drops is gone
        stack.enter_context(using_threads(_fitting_threads(run)))
        with out_of_memory_as(too_many_weights):
            state = open_state(run, world)
        world.require_same({"updates done": state.step})
        files = RunFiles(run, state, world)
        draw = stack.enter_context(open_batches(run, world, state.device))
        for network in (state.network, state.base):
            if network is not None and not run.shard:  # its blocks are gathered one by one
                num_forwards = (config.steps - state.step) * config.accumulation
                compile_network(network, run.compile, num_forwards=num_forwards)
        gradients = Gradients(run, state, draw, world)
        is_told = bool(config.log_with) and world.is_first
        tell = stack.enter_context(tracking(run, state.step)) if is_told else None
        while state.step < config.steps:
            if state.step in snapshots:  # its state is saved: a resumed run comes here too
                files.write_results(step=state.step)
            gradients.of_update()
            requests.exchange()
            with out_of_memory_as(too_many_weights):
                if not world.is_alone:
                    add_up_gradients(state.trained().values(), world)
                state.update()
            at_end = state.step == config.steps
            at_checkpoint = (  # also before further results are written, to continue from
                state.step % config.checkpoint_every == 0 or state.step in snapshots
                or bool(at_end and config.ema_lengths)
            )  # fmt: skip
            if state.step % report_every == 0 or at_checkpoint or at_end:
                record = gradients.record()
                if at_checkpoint:
                    files.save()
                    record = replace(record, held_out=files.held_out_loss(gradients.at_once))
                files.log(record)
                if tell:
                    tell(record)
                yield record
            if requests.is_agreed:
                files.save()
                raise requests.stopped(
                    f"stopped at update {state.step} of {config.steps}; "
                    f"run the same command again to continue"
                )
        files.require_finite()
        files.write_results()


def _fitting_threads(run: Run) -> int:
    def inputs() -> tuple[Tensor, Conditions]:
        x0, conditions = run.examples.draw([0], flip=None, generator=None)
        return x0.float(), to(conditions, x0.device, torch.float32)

    num_images = run.config.micro_batch or run.config.batch_size
    return fitting_number(run.denoiser.network, inputs, num_images=num_images)


class Gradients:
    """What the losses of `run` say about the weights of `state`, batch by batch.

    `at_once`: the most images that go through the network at a time, fewer where memory ran out.
    """

    def __init__(self, run: Run, state: TrainingState, draw: Draw, world: World = ALONE) -> None:
        self.run, self.state, self.draw, self.world = run, state, draw, world
        self._largest_share = -(-run.config.batch_size // world.size)
        self.at_once = min(run.config.micro_batch or self._largest_share, self._largest_share)
        self.schedule = run.denoiser.schedule
        if state.device.type != "cpu":  # so that looking up draws there copies nothing
            name = "sigmas" if isinstance(self.schedule, FlowSchedule) else "alphas_cumprod"
            table = getattr(self.schedule, name).float()  # Apple's GPUs have no float64
            self.schedule = replace(self.schedule, **{name: table.to(state.device)})
        self._losses: list[Tensor] = []  # since the last record, on the device: reading them waits
        self._start, self._told = time.monotonic(), self.at_once

    def of_update(self) -> list[Tensor]:
        """Add the gradients of the next update to `.grad`; the losses of its batches, (3,) each.

        Raises MissingError where not one image fits into the device's memory, and where the
        network is divided, whose processes cannot go back in step, at the first lack of it.
        """
        run = self.run
        while True:
            try:
                with joint_passes(self.world) if run.shard else nullcontext():
                    losses = [self._of_batch(micro) for micro in range(run.config.accumulation)]
                self._losses += losses
                return losses
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # here nothing holds the activations of the failed pass any more
            self.state.optimizer.zero_grad(set_to_none=True)
            if self.state.device.type != "cpu":  # blocks of the sizes that did not fit
                torch.get_device_module(self.state.device).empty_cache()
            if self.at_once == 1 or run.clusters or run.shard:
                raise MissingError(
                    f"{run.denoiser.record.origin}: training does not fit into the device's "
                    f"memory with {self.at_once} images at a time; use --gradient-checkpointing, "
                    f"--dtype bf16, a smaller --micro-batch (with --multitask: --batch-size) or "
                    f"--resolution, more processes, or a device with more memory"
                )
            self.at_once = (self.at_once + 1) // 2

    def _of_batch(self, micro: int) -> Tensor:
        """(Minimised, denoising, consistency) losses of one batch, or of this process's share.

        Over the parts and the processes, losses and gradients add up to the batch's. Those that
        gather a divided network together go in the same number of parts, each with an image.
        """
        run, state, config, device = self.run, self.state, self.run.config, self.state.device
        batch, found = self.draw(state.step, micro).on(device), []
        num = len(batch.t)
        num_parts = -(-num // self.at_once)
        if run.shard:
            smallest_share = config.batch_size // self.world.size
            num_parts = min(-(-self._largest_share // self.at_once), smallest_share)
        for i in range(num_parts):
            part = batch.part(slice(num * i // num_parts, num * (i + 1) // num_parts))
            with torch.autocast(device.type, TORCH_DTYPES[run.dtype], enabled=run.dtype != "fp32"):
                losses = expert_losses(
                    state.network, state.base, self.schedule, x0=part.x0, eps=part.eps, t=part.t,
                    conditions=to(part.conditions, device, torch.float32),
                    consistency=config.consistency,
                )  # fmt: skip
            of_such = config.batch_size / len(part.t)  # 2.5 for two images of five
            weight = config.accumulation * of_such
            order = derived_generator(config.seed, run.choice.range, state.step, micro, "order")
            total = state.reduction.backward(
                losses.total, part.t, list(state.parameters.values()), step=state.step,
                generator=order,
                scale=lambda loss: state.scaler.scale(loss / weight),  # noqa: B023
            )  # fmt: skip
            means = (total, losses.denoising.mean(), losses.consistency.mean())
            found.append(torch.stack(means) / of_such)
            del losses  # its graph, before the next one grows
        return torch.stack(found).sum(0)

    def record(self) -> TrainStep:
        """The means of the losses since the last record, the same in all processes.

        Raises NumericsError if they are not finite.
        """
        step, config = self.state.step, self.run.config
        means = torch.stack(self._losses).mean(0).cpu()
        self.world.add_up(means)
        loss, denoising, consistency = means.tolist()
        if not means.isfinite().all():
            raise NumericsError(
                f"the loss became {loss} by update {step}; only a good checkpoint is "
                f"kept, if any: lower --lr, or use --dtype bf16 or fp32, with --force to start anew"
            )
        now, least = time.monotonic(), -self.world.largest(-self.at_once)
        rate = len(self._losses) * config.batch_size / max(now - self._start, 1e-9)
        halved_to = least if least < self._told else None
        self._losses, self._start, self._told = [], now, least
        lr = learning_rate(step - 1, config)
        return TrainStep(step, loss, denoising, consistency, lr, rate, halved_to=halved_to)


class RunFiles:
    """Curve, checkpoint, snapshots and results of `run`, which goes on from `state`.

    Every process calls every method, the first one writes and measures the held-out loss: it takes
    as long as an update or a few, once in a thousand. Where the network is divided, all take part.
    """

    def __init__(self, run: Run, state: TrainingState, world: World) -> None:
        self.run, self.state, self.world = run, state, world
        self._takes_part = world.is_first or run.shard  # has slices of what is written
        self._curve = metrics_path(run.output)
        if world.is_first:  # what a killed run wrote after its checkpoint is done again
            lines = self._curve.read_text().splitlines() if self._curve.exists() else []
            kept = (f"{line}\n" for line in lines if _step_of(line) <= state.step)
            write_whole(self._curve, "".join(kept))

    def log(self, record: TrainStep) -> None:
        """Add a point to the curve, and let it reach those who watch."""
        if self.world.is_first:
            with writing(self._curve), self._curve.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")

    def save(self) -> None:
        """Save the checkpoint."""
        self.require_finite()
        if self._takes_part:
            self.state.save(checkpoint_path(self.run.output), self.run.identity, self.world)
        self.world.wait()

    def held_out_loss(self, at_once: int) -> float | None:
        """Of what the run is for, in passes of `at_once` images.

        A divided network is asked by all processes, for the same.
        """
        run, network, loss = self.run, self.state.network, None
        if run.held_out is not None and self._takes_part:
            span, schedule, num = run.choice.range, run.denoiser.schedule, run.config.held_out
            draws = replace(draws_of_range(run.held_out, span, schedule, num), batch_size=at_once)
            joint = joint_passes(self.world) if run.shard else nullcontext()
            # it is compiled for other batches
            with holding(network, self.state.weights()), uncompiled(network), joint:
                loss = draws.loss(network)
        self.world.wait()
        return loss

    def require_finite(self) -> None:
        if self.world.largest(int(not self.state.is_finite())):
            raise NumericsError(
                f"a weight became infinite or NaN by update {self.state.step}; only a good "
                f"checkpoint is kept, if any: lower --lr, with --force to start anew"
            )

    def write_results(self, step: int | None = None) -> None:
        """Write every average, and last the usual weights: where the result lies, all of them do.

        With `step` as snapshots of the run as it is now, whose checkpoint is saved: what a run of
        so many `steps` would have saved, but that a learning rate falls over the whole run.
        """
        run = self.run
        for length in (*(run.config.ema_lengths or []), None) if self._takes_part else ():
            weights = gather(self.state.weights(length), self.world)
            if not self.world.is_first:
                continue
            if rank := run.config.lora:
                scale = (run.config.lora_alpha or rank) / rank
                part = run.denoiser.backbone.part
                weights = adapter_tensors(weights, scale=scale, part=part)
            elif run.config.projection == "fold":
                weights = fold_weights(weights, self.state.network)
            weights = stored_in(weights, run.save_dtype, str(run.output))
            path = variant_path(run.output, step=step, length=length)
            averaging: dict[str, Any] = {} if path == run.output else {"step": self.state.step}
            if length is not None:
                averaging |= {"ema_length": length, "ema_gamma": gamma_of(length)}
            write_artifact(path, weights, result_record(run, self.state.step, averaging))
        if step is None and self.world.is_first:
            checkpoint_path(run.output).unlink(missing_ok=True)
        self.world.wait()


def result_record(run: Run, steps: int, averaging: dict[str, Any]) -> DenoiserRecord:
    """The header of a result after `steps` updates: every setting that is set, and `averaging`."""
    config, examples, record = run.config, run.examples, run.denoiser.record
    fields = ("source", "model_config", "scheduler_config", "num_train_timesteps", "companions",
              "single_file")  # fmt: skip
    model: dict[str, Any] = {name: getattr(record, name) for name in fields}
    data = {"source": examples.source, "fingerprint": examples.fingerprint, "num": len(examples)}
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    settings |= {"dtype": run.dtype, "flip": run.flip, "crop": examples.crop}
    settings |= {"resolution": list(examples.image_shape[1:]), **averaging}
    if run.save_dtype:
        settings["save_dtype"] = run.save_dtype
    if run.clusters:
        settings["cluster_ranges"] = list(map(str, run.clusters))
    if run.from_scratch:
        return BaseRecord(**model, training={**settings, "data": data})
    span, index, of = run.choice.range, run.choice.index, run.choice.of
    held: dict[str, Any] = {}
    if config.lora:
        alpha, targets = config.lora_alpha or config.lora, config.lora_targets or "attention"
        adapter = {"rank": config.lora, "alpha": alpha, "targets": targets}
        held = {"holds": "adapter", "adapter": adapter}
    return ExpertRecord(
        **model, range=[span.start, span.stop], index=index, of=of, base=record.fingerprint,
        p=config.p, steps=steps, seed=config.seed, projection=config.projection, data=data,
        training=settings, **held,
    )  # fmt: skip


def _step_of(line: str) -> float:
    """The update of a line; infinite for one that was being written when its run was killed."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
