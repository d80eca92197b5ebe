"""What training costs in floating-point operations, counted on one image and scaled.

Counted are the multiplications and additions of convolutions, matrix products and attention in the
denoiser and in the frozen base (`torch.utils.flop_counter`), which is nearly all there is; not the
optimizer, the moving averages, or the frozen VAE and text encoders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.config import FinetuneConfig
from deme_cli.training.networks import open_networks
from deme_cli.training.objective import expert_losses
from deme_cli.training.run import Run


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one image: through the network forward, backward, and through the base."""

    forward: int
    backward: int
    base: int


def count_passes(run: Run) -> PassCost:
    """Count the passes of `run`'s networks on its first training image."""
    network, base = open_networks(run)
    draws = run.denoiser.schedule.indices(run.choice.range)
    x0, conditions = run.examples.draw([0], flip=None, generator=None)
    common = {
        "x0": x0.float().cpu(), "eps": torch.zeros_like(x0, dtype=torch.float32, device="cpu"),
        "t": torch.tensor([draws.start]), "conditions": conditions,
    }  # fmt: skip
    schedule = run.denoiser.schedule
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = expert_losses(network, None, schedule, **common, consistency=0.0)
        forward = counter.get_total_flops()
        losses.total.mean().backward()
        backward = counter.get_total_flops() - forward
        through_base = 0
        if base is not None:
            with torch.no_grad():
                expert_losses(base, None, schedule, **common, consistency=0.0)
            through_base = counter.get_total_flops() - forward - backward
    return PassCost(forward, backward, through_base)


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
