"""Moving averages of the weights, kept while a run trains.

theta_hat(t) = beta_t theta_hat(t - 1) + (1 - beta_t) theta(t) after update t = 1, 2, ... The decay
beta_t of the usual average is that of diffusers' EMAModel with its warm-up; those of power-function
profiles are in power_profile.py. All forget where the run started: beta_1 = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from deme_cli.training.power_profile import beta, gamma_of


class Average:
    """One average. `tensors` are in the order of the parameters, in float32 whatever those are.

    It costs one more copy of the weights on the device, 4 bytes per parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: Callable[[int], float]) -> None:
        self.decay = decay
        self.tensors: list[Tensor] = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter], t: int) -> None:
        """Take in the weights after update t, in one pass over them (EMAModel.step makes three)."""
        weights = [p.detach().float() for p in parameters]
        torch._foreach_lerp_(self.tensors, weights, 1 - self.decay(t))


def open_averages(
    parameters: Sequence[nn.Parameter], ema_decay: float, lengths: Sequence[float]
) -> dict[float | None, Average]:
    """The power-function averages by their length; under None the usual one, if it is wanted."""
    decays: dict[float | None, Callable[[int], float]] = {
        length: partial(beta, gamma=gamma_of(length)) for length in lengths
    }
    if ema_decay:
        decays[None] = partial(warmed_up, ema_decay)
    return {length: Average(parameters, decay) for length, decay in decays.items()}


def warmed_up(decay: float, t: int) -> float:
    """`decay`, approached as 1 - t^(-3/4) (the recipe of unconditional training in diffusers)."""
    return min(decay, 1 - t**-0.75)
