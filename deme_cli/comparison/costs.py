"""What training costs in floating-point operations, counted on one image and scaled.

Counted are the multiplications and additions of convolutions, matrix products and attention in the
denoiser and in the frozen base (`torch.utils.flop_counter`), which is nearly all there is; not the
optimizer, the moving averages, or the frozen VAE and text encoders.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.diffusion.execution import forward_flops
from deme_cli.files import write_whole
from deme_cli.timesteps import RangeChoice, TimestepRange
from deme_cli.training.objective import expert_losses
from deme_cli.training.setup import Plan, Run, prepare
from deme_cli.training.state import open_networks

if TYPE_CHECKING:
    from deme_cli.comparison.jobs import Stage


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one image: through the network forward, backward, and through the base."""

    forward: int
    backward: int
    base: int


def passes_of(stage: Stage, projection: str) -> PassCost:
    """The costs of one image through `stage`'s base, counted once and kept in its folder."""
    path, kept = stage.folder / "passes.json", {}
    key = f"{projection} {stage.record.fingerprint} {json.dumps(stage.tables['data'])}"
    with suppress(OSError, ValueError):  # not there, or damaged
        kept = json.loads(path.read_text())
    if key in kept:
        return PassCost(**kept[key])
    settings = FinetuneConfig(projection=projection, held_out=0, cache="off", batch_size=1)
    whole = TimestepRange(0, stage.record.num_train_timesteps)
    plan = Plan(
        stage.base, DataConfig(**stage.tables["data"]), settings, Path("unused.safetensors"),
        RangeChoice(whole, 1, 1), device="cpu", pipeline=stage.tables["model"].get("pipeline"),
    )  # fmt: skip
    passes = count_passes(prepare(plan))
    write_whole(path, [json.dumps({**kept, key: asdict(passes)}, indent=1).encode()])
    return passes


def count_passes(run: Run) -> PassCost:
    """Count the passes of `run`'s networks on its first training image.

    The base counts also where this run does not ask it.
    """
    network, schedule = open_networks(run)[0], run.denoiser.schedule
    x0, conditions = run.examples.draw([0], flip=None, generator=None)
    x0, first = x0.float().cpu(), schedule.indices(run.choice.range).start
    forward = forward_flops(network, x0, conditions)
    base = 0 if run.from_scratch else forward_flops(run.denoiser.network, x0, conditions)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = expert_losses(
            network, None, schedule, x0=x0, eps=torch.zeros_like(x0), t=torch.tensor([first]),
            conditions=conditions, consistency=0.0,
        )  # fmt: skip
        losses.total.mean().backward()
    return PassCost(forward, counter.get_total_flops() - forward, base)


def flops_per_update(config: FinetuneConfig, passes: PassCost) -> float:
    """One optimizer update of `config`, on average over the run.

    Gradients of k clusters cost k backward passes through the whole batch, in every update (pcgrad)
    or in the first batch of every `multitask_every`-th (nashmtl).
    """
    images = config.batch_size * config.accumulation
    backwards = float(config.accumulation)
    if config.multitask == "pcgrad":
        backwards *= config.clusters
    elif config.multitask == "nashmtl":
        backwards += (config.clusters - 1) / config.multitask_every
    base = passes.base * images if config.consistency else 0
    return passes.forward * images + passes.backward * config.batch_size * backwards + base
