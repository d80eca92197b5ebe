"""The denoising loss on images that training never sees, on the same draws every time.

n draws (image, t, eps) of x_t are fixed; x_0 and the conditions come from the examples batch by
batch, the mean of the posterior where there is a VAE. Captions are never left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import predict
from deme_cli.diffusion.schedule import Schedule
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import Examples

_BATCH = 256
Check = Callable[..., None]  # called between batches, with (done, total) if known; raises to stop


@dataclass(frozen=True)
class FixedDraws:
    """What networks are measured on.  images, t: (n,)   noise(draws (B,)) -> eps (B, C, H, W)

    targets: (n, C, H, W), what they should say, where that is not the schedule's own target.
    """

    examples: Examples
    schedule: Schedule
    images: Tensor
    t: Tensor
    noise: Callable[[Tensor], Tensor]
    batch_size: int = _BATCH
    targets: Tensor | None = None

    @torch.no_grad()
    def errors(
        self, network: nn.Module, *, check: Check | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """Squared error of each draw, its mean over elements: (n,) float64.

        On the draws `chosen` (all by default). The network is run in its own dtype, the rest in
        float32, the sums in float64.
        """
        chosen = torch.arange(len(self.t)) if chosen is None else chosen
        errors = torch.zeros(len(chosen), dtype=torch.float64)
        for place in torch.arange(len(chosen)).split(self.batch_size):
            if check:
                check()
            inputs, target = self._batch(chosen[place], network)
            error = predict(network, *inputs).float().cpu() - target
            errors[place] = error.square().flatten(1).mean(dim=1, dtype=torch.float64)
        return errors

    def loss(self, network: nn.Module, *, check: Check | None = None) -> float:
        """Mean squared error over draws and elements; see `errors`."""
        return self.errors(network, check=check).mean().item()

    def loss_and_gradient(self, network: nn.Module, check: Check) -> float:
        """The loss, and its gradient in `.grad` of every parameter of `network`."""
        network.requires_grad_(True)
        network.zero_grad(set_to_none=True)
        total, size = 0.0, len(self.t) * math.prod(self.examples.shape)
        for chosen in torch.arange(len(self.t)).split(self.batch_size):
            check()
            inputs, target = self._batch(chosen, network)
            output = predict(network, *inputs).float()
            loss = (output - target.to(output.device)).square().sum() / size
            loss.backward()
            total += loss.item()
        network.requires_grad_(False)
        return total

    @torch.no_grad()
    def outputs(self, network: nn.Module, chosen: Tensor) -> Tensor:
        """What `network` says at the draws `chosen`: (len(chosen), C, H, W) float32."""
        parts = chosen.split(self.batch_size)
        inputs = (self._batch(part, network)[0] for part in parts)
        return torch.cat([predict(network, *one).float().cpu() for one in inputs])

    def _batch(
        self, chosen: Tensor, network: nn.Module
    ) -> tuple[tuple[Tensor, Tensor, Conditions], Tensor]:
        """The inputs of these draws on the network's device, and what it should say, on the CPU."""
        first = next(network.parameters())
        x0, conditions = self.examples.draw(self.images[chosen].tolist(), flip=None, generator=None)
        x0, eps, t = x0.cpu(), self.noise(chosen), self.t[chosen]
        inputs = (
            self.schedule.add_noise(x0, eps, t).to(first.device, first.dtype),
            self.schedule.times(t).to(first.device),
            to(conditions, first.device, first.dtype),
        )
        target = self.schedule.target(x0, eps, t) if self.targets is None else self.targets[chosen]
        return inputs, target


def draws_of_range(
    examples: Examples, span: TimestepRange, schedule: Schedule, num: int
) -> FixedDraws:
    """`num` draws with timesteps spread evenly over the range."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn((num, *examples.shape), generator=generator)
    span = schedule.indices(span)
    t = span.start + torch.arange(num) * len(span) // num
    t = t[torch.randperm(num, generator=generator)]
    images = torch.arange(num) % len(examples)
    return FixedDraws(examples, schedule, images, t, eps.__getitem__)
