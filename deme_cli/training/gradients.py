"""The gradients of one update: batch after batch, each in parts as large as memory allows.

B images of a batch over the whole launch. The gradient is that of the mean over B whatever part of
a batch goes through the network at a time: every part is weighed by its share of B. Where memory
runs out, the parts are halved and the update begins anew; nothing of it was applied yet.
Each process does so for itself, for they meet when their gradients are there; where the network is
divided among them, whose passes they make together, it ends the run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import TORCH_DTYPES
from deme_cli.diffusion.schedule import FlowSchedule, Schedule
from deme_cli.diffusion.threads import fitting_number
from deme_cli.distributed import ALONE, World
from deme_cli.errors import MissingError, is_out_of_memory
from deme_cli.training.batches import Batch, Batches, derived_generator
from deme_cli.training.objective import expert_losses
from deme_cli.training.setup import Run
from deme_cli.training.sharding import joint_passes
from deme_cli.training.state import TrainingState


class Gradients:
    """What the losses of `run` say about the weights of `state`, batch by batch.

    `at_once`: the most images that go through the network at a time, fewer where memory ran out.
    """

    def __init__(
        self, run: Run, state: TrainingState, base: nn.Module | None, source: Batches,
        world: World = ALONE,
    ) -> None:  # fmt: skip
        self.run, self.state, self.base, self.source = run, state, base, source
        self.world, self._largest_share = world, -(-run.config.batch_size // world.size)
        self.at_once = min(run.config.micro_batch or self._largest_share, self._largest_share)
        self.schedule = schedule_on(run.denoiser.schedule, state.device)

    def of_update(self) -> list[Tensor]:
        """Add the gradients of the next update to `.grad`; the losses of its batches, (3,) each.

        Raises MissingError where not one image fits into the device's memory, and where the
        network is divided, whose processes cannot go back in step, at the first lack of it.
        """
        while True:
            try:
                with joint_passes(self.world) if self.run.shard else nullcontext():
                    return [self.of_batch(micro) for micro in range(self.run.config.accumulation)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._make_room()  # here nothing holds the activations of the failed pass any more

    def of_batch(self, micro: int) -> Tensor:
        """(Minimised, denoising, consistency) losses of one batch, or of this process's share.

        Over the parts and the processes, losses and gradients add up to the batch's.
        """
        batch = self.source.batch(self.state.step, micro)
        num = len(batch.t)
        parts = self._num_parts(num)
        edges = [num * i // parts for i in range(parts + 1)]
        losses = [
            self._of_part(batch.part(slice(start, stop)), micro) for start, stop in pairwise(edges)
        ]
        return losses[0] if parts == 1 else torch.stack(losses).sum(0)

    def _num_parts(self, num: int) -> int:
        """Into how many parts `num` images go.

        The same number in all processes that gather a divided network together, and each part with
        an image: where shares are unequal, some parts may be larger by one.
        """
        if not self.run.shard:
            return -(-num // self.at_once)
        smallest_share = self.run.config.batch_size // self.world.size
        return min(-(-self._largest_share // self.at_once), smallest_share)

    def _of_part(self, batch: Batch, micro: int) -> Tensor:
        run, state, config, device = self.run, self.state, self.run.config, self.state.device
        t = batch.t.to(device, non_blocking=True)
        with torch.autocast(device.type, TORCH_DTYPES[run.dtype], enabled=run.dtype != "fp32"):
            losses = expert_losses(
                state.network, self.base, self.schedule, t=t, consistency=config.consistency,
                x0=batch.x0.to(device, non_blocking=True),
                eps=batch.eps.to(device, non_blocking=True),
                conditions=to(batch.conditions, device, torch.float32),
            )  # fmt: skip
        num_parts = config.batch_size / len(t)  # 2.5 for two images of five
        order = derived_generator(config.seed, run.choice.range, state.step, micro, "order")
        total = state.reduction.backward(
            losses.total, t, list(state.network.parameters()), step=state.step, generator=order,
            scale=lambda loss: state.scaler.scale(loss / (config.accumulation * num_parts)),
        )  # fmt: skip
        means = torch.stack([total, losses.denoising.mean(), losses.consistency.mean()])
        return means / num_parts

    def _make_room(self) -> None:
        """Halve the parts. Raises MissingError where they cannot be smaller."""
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.device.type != "cpu":  # blocks of the sizes that did not fit
            torch.get_device_module(self.state.device).empty_cache()
        if self.at_once == 1 or self.run.clusters or self.run.shard:
            raise MissingError(out_of_memory(self.run, self.at_once))
        self.at_once = (self.at_once + 1) // 2


def schedule_on(schedule: Schedule, device: torch.device) -> Schedule:
    """`schedule` with its table on a GPU, so that looking up draws there copies nothing.

    In float32, as the images that it is applied to: Apple's GPUs have no float64.
    """
    if device.type == "cpu":
        return schedule
    name = "sigmas" if isinstance(schedule, FlowSchedule) else "alphas_cumprod"
    return replace(schedule, **{name: getattr(schedule, name).float().to(device)})


def fitting_threads(run: Run) -> int:
    """Threads on a processor for the passes of the images that go through at a time."""

    def inputs() -> tuple[Tensor, Conditions]:
        x0, conditions = run.examples.draw([0], flip=None, generator=None)
        return x0.float(), to(conditions, x0.device, torch.float32)

    num_images = run.config.micro_batch or run.config.batch_size
    return fitting_number(run.denoiser.network, inputs, num_images=num_images)


def too_many_weights(run: Run) -> str:
    """What to say of a lack of memory where smaller parts would not help."""
    tip = "leave out --ema-lengths, " if run.config.ema_lengths else ""
    tip += "use more processes" if run.shard else "divide the network among several with --shard"
    return (
        f"{run.denoiser.record.source}: the weights with their moments and averages do not fit "
        f"into the device's memory; {tip}, or use a device with more memory"
    )


def out_of_memory(run: Run, size: int) -> str:
    """What to say where `size` images at a time are too many and cannot be fewer."""
    why = " (whole batches, for --multitask)" if run.clusters else ""
    images = "one image" if size == 1 else f"{size} images{why}"
    tips = [] if run.config.gradient_checkpointing else ["--gradient-checkpointing"]
    tips += ["--dtype bf16"] if run.dtype == "fp32" else []
    tips += ["more processes"] if run.shard else []
    if size > 1:
        tips += ["a smaller --batch-size" if run.clusters else f"--micro-batch {size // 2}"]
    return (
        f"{run.denoiser.record.source}: training does not fit into the device's memory with "
        f"{images} at a time; use {', '.join([*tips, 'a smaller --resolution'])}, or a device "
        f"with more memory"
    )
