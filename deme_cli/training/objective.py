"""What one expert minimises: denoising on its range, consistency with the frozen base (Eq. 3-6).

B batch, T timesteps, k clusters. For an image (x_0, t, c, target) the loss is ||target - e||^2 +
lambda ||e_base - e||^2, both at the same (x_t, t, c), weighed 1 : 1 in the paper (Eq. 5). c are the
conditions (caption, class; nothing for unconditional models). Norms are means over elements, as
everybody trains; what becomes of the losses of a batch's images is told in weighting.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import predict
from deme_cli.diffusion.schedule import Schedule
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Losses:
    """Of each image (B,): what is minimised, with its graph, and its two terms before weighing."""

    total: Tensor
    denoising: Tensor
    consistency: Tensor


def draw_timesteps(
    num: int, span: TimestepRange, num_train_timesteps: int, *, p: float, per_batch: bool = False,
    antithetic: bool = False, generator: torch.Generator,
) -> Tensor:  # fmt: skip
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


def draw_by_cluster(
    num: int, clusters: Sequence[TimestepRange], *, generator: torch.Generator
) -> Tensor:
    """t ~ U(cluster j mod k) for image j, so that clusters share the batch.  -> (num,) int64"""
    edges = torch.tensor([[span.start, span.stop] for span in clusters])
    start, stop = edges[torch.arange(num) % len(clusters)].unbind(1)
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    return start + (uniform * (stop - start)).long()


def expert_losses(
    network: nn.Module, base: nn.Module | None, schedule: Schedule, *, x0: Tensor, eps: Tensor,
    t: Tensor, conditions: Conditions | None = None, consistency: float,
) -> Losses:  # fmt: skip
    """Eq. 5 on one batch: denoising plus `consistency` times the distance to the base's output.

    x0, eps: (B, C, H, W)   t: (B,) draws of the schedule   conditions: (B, ...) each   base: None
    where `consistency` is 0.
    """
    x_t, times = schedule.add_noise(x0, eps, t), schedule.times(t)
    output = predict(network, x_t, times, conditions).float()
    denoising = _squared_error(output, schedule.target(x0, eps, t))
    if base is None:
        return Losses(denoising, denoising.detach(), torch.zeros_like(denoising.detach()))
    with torch.no_grad():
        base_output = predict(base, x_t, times, conditions)
    to_base = _squared_error(output, base_output)
    return Losses(denoising + consistency * to_base, denoising.detach(), to_base.detach())


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Of each image, the mean over its elements: (B, ...) -> (B,) float32."""
    return (output - target.float()).square().flatten(1).mean(dim=1)
