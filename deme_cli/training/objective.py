"""What one expert minimises: denoising on its range, consistency with the frozen base (Eq. 3-6).

B batch, T timesteps. For a batch (x_0, t, c, target): loss = mean ||target - e||^2 + lambda
mean ||e_base - e||^2, both at the same (x_t, t, c), weighed 1 : 1 in the paper (Eq. 5). c are the
conditions (caption, class; nothing for unconditional models). Means are over all elements, as
everybody trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import predict
from deme_cli.diffusion.schedule import Schedule
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Loss:
    """Scalars: what is minimised, and its two terms before weighing."""

    total: Tensor
    denoising: Tensor
    consistency: Tensor


def draw_timesteps(
    num: int,
    span: TimestepRange,
    num_train_timesteps: int,
    *,
    p: float,
    per_batch: bool = False,
    antithetic: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """t ~ U(span) with probability 1 - p, t ~ U[0, T) with probability p (Eq. 6).  -> (num,) int64

    Each image decides for itself; `per_batch` decides once for all, and `antithetic` draws pairs
    t, start + stop - 1 - t of the same range: departures of the official code, for reproducers.
    """
    draws = (num + 1) // 2 if antithetic else num
    everywhere = torch.rand(1 if per_batch else draws, generator=generator) < p
    start = torch.where(everywhere, 0, span.start).expand(draws)
    stop = torch.where(everywhere, num_train_timesteps, span.stop).expand(draws)
    # float64: in float32 a product just below `stop` may round up to it
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    t = start + (uniform * (stop - start)).long()
    if antithetic:
        t = torch.stack([t, start + stop - 1 - t], dim=1).flatten()[:num]
    return t


def expert_loss(
    network: nn.Module,
    base: nn.Module | None,
    schedule: Schedule,
    *,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    conditions: Conditions | None = None,
    consistency: float,
) -> Loss:
    """Eq. 5 on one batch: denoising plus `consistency` times the distance to the base's output.

    x0, eps: (B, C, H, W)   t: (B,) draws of the schedule   conditions: (B, ...) each. The base is
    not run where `consistency` is 0.
    """
    x_t, times = schedule.add_noise(x0, eps, t), schedule.times(t)
    output = predict(network, x_t, times, conditions).float()
    denoising = functional.mse_loss(output, schedule.target(x0, eps, t).float())
    if base is None or consistency == 0:
        return Loss(denoising, denoising.detach(), torch.zeros_like(denoising.detach()))
    with torch.no_grad():
        base_output = predict(base, x_t, times, conditions).float()
    to_base = functional.mse_loss(output, base_output)
    return Loss(denoising + consistency * to_base, denoising.detach(), to_base.detach())
