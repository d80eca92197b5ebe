"""One-step samplers as tables of numbers, so that their steps can be compiled with the network.

A step of DDIM, DDPM or Euler is linear in x, in the network's output and in fresh noise z, but for
the clipping of x_0:

    x_0 = p x + q output      x' = k clip(x_0) + a x + b output + c z

and the network sees s x. The numbers are found by asking diffusers' scheduler what it makes of
single numbers, step by step: its formulas and its alphas are the only ones.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.sampling.scheduler import can_clip, scale_input, take_step, uses_noise

TABLED = ("ddim", "ddpm", "euler")
_FAR_WITHIN, _FAR_BEYOND = 2.0**-20, 16.0  # of where x_0 is clipped


def tabulate(scheduler: Any, config: SampleConfig) -> Tensor | None:
    """Rows (s, p, q, k, a, b, c, clip), one for each step: (steps, 8) float32 on the CPU.

    `config` names the sampler of `scheduler`, whose timesteps are set; clip is infinite where x_0
    is not clipped. None for samplers that remember earlier steps or clip by quantiles, and where
    x_0 cannot be told from x (no signal at the first step).
    """
    if config.sampler not in TABLED or scheduler.config.get("thresholding"):
        return None
    clips = can_clip(type(scheduler)) and scheduler.config.clip_sample
    clip = float(scheduler.config.clip_sample_range) if clips else torch.inf
    scheduler = copy.deepcopy(scheduler)  # Euler counts its steps
    rows = [_row(scheduler, t, config, clip) for t in scheduler.timesteps.tolist()]
    table = torch.tensor(rows, dtype=torch.float64)
    return table.float() if table[:, :-1].isfinite().all() else None


def advance(row: Tensor, x_t: Tensor, output: Tensor, noise: Tensor | None) -> Tensor:
    """x_t -> x_{t'} by a row of the table.  x_t, output, noise: (B, C, h, w) float32"""
    _, p, q, k, a, b, c, clip = row.unbind()
    x_next = k * (p * x_t + q * output).clamp(-clip, clip) + a * x_t + b * output
    return x_next if noise is None else x_next + c * noise


def _row(scheduler: Any, t: float, config: SampleConfig, clip: float) -> list[float]:
    """The scheduler's step at t, from its answers to numbers of which at most one is not 0."""

    def ask(x: list[float], output: list[float]) -> Tensor:
        """x' and x_0 of each pair, all with the same noise: (2, pairs) float64."""
        columns = [torch.tensor(values, dtype=torch.float64)[:, None] for values in (output, x)]
        generators = [torch.Generator().manual_seed(0) for _ in x] if uses_noise(config) else None
        x_next, *others = take_step(
            scheduler, columns[0], t, columns[1], config=config, generators=generators
        )
        x0 = others[0] if others else torch.zeros_like(x_next)  # Euler of flow models tells none
        return torch.cat([x_next, x0], dim=1).T.double()

    s = float(scale_input(scheduler, torch.ones(1, dtype=torch.float64), t))
    small = 1.0 if clip == torch.inf else _FAR_WITHIN * clip
    (noise, x, output), (_, p, q) = ask([0, small, 0], [0, 0, small]).tolist()
    a, b, p, q = (x - noise) / small, (output - noise) / small, p / small, q / small
    c = noise / float(_noise()) if uses_noise(config) else 0.0
    k = 0.0
    if clip < torch.inf and math.isfinite(p):
        by_x = abs(p) >= abs(q)
        large = _FAR_BEYOND * clip / max(abs(p), abs(q))
        (x_next,), (x0,) = ask([large * by_x], [large * (not by_x)]).tolist()
        k = (x_next - noise - large * (a if by_x else b)) / (x0 - large * (p if by_x else q))
    return [s, p, q, k, a - k * p, b - k * q, c, clip]


def _noise() -> Tensor:
    """What a step adds c times of."""
    return torch.randn(1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
