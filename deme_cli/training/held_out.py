"""The denoising loss on images that training never sees, on the same draws every time.

n draws (image, t, eps) of x_t are fixed; x_0 and the conditions come from the examples batch by
batch, the mean of the posterior where there is a VAE. Captions are never left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deme_cli.data.images import open_images
from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.diffusion.schedule import Schedule
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import Examples, PixelExamples

_BATCH = 256
Check = Callable[[], None]  # called between batches; raises to stop


@dataclass(frozen=True)
class FixedDraws:
    """What networks are measured on.  images, t: (n,)   noise(draws (B,)) -> eps (B, C, H, W)"""

    examples: Examples
    schedule: Schedule
    images: Tensor
    t: Tensor
    noise: Callable[[Tensor], Tensor]
    batch_size: int = _BATCH

    @torch.no_grad()
    def loss(
        self, network: nn.Module, *, weights: Mapping[str, Tensor] | None = None,
        check: Check | None = None,
    ) -> float:  # fmt: skip
        """Mean squared error of `network`, or of it with other `weights`, over draws and elements.

        The network is run in its own dtype, the rest in float32, the sum in float64.
        """
        first = next(network.parameters())
        device, dtype, total = first.device, first.dtype, 0.0
        predictor = _Predictor(network)
        weights = {f"network.{name}": value for name, value in (weights or {}).items()}
        for chosen in torch.arange(len(self.t)).split(self.batch_size):
            if check:
                check()
            indices = self.images[chosen].tolist()
            x0, conditions = self.examples.draw(indices, flip=None, generator=None)
            x0, eps, t = x0.cpu(), self.noise(chosen), self.t[chosen]
            inputs = (
                self.schedule.add_noise(x0, eps, t).to(device, dtype),
                self.schedule.times(t).to(device),
                to(conditions, device, dtype),
            )
            output = functional_call(predictor, weights, inputs).float().cpu()
            error = output - self.schedule.target(x0, eps, t)
            total += error.square().sum(dtype=torch.float64).item()
        return total / (len(self.t) * math.prod(self.examples.shape))


class _Predictor(nn.Module):
    """`predict` as a module, so that it can be called with other weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return predict(self.network, x_t, t, conditions)


def draws_of_range(
    examples: Examples | None, span: TimestepRange, schedule: Schedule, num: int,
    *, batch_size: int = _BATCH,
) -> FixedDraws | None:  # fmt: skip
    """`num` draws with timesteps spread evenly over the range; None without images or draws."""
    if examples is None or num == 0 or len(examples) == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn((num, *examples.shape), generator=generator)
    span = schedule.indices(span)
    t = span.start + torch.arange(num) * len(span) // num
    t = t[torch.randperm(num, generator=generator)]
    images = torch.arange(num) % len(examples)
    return FixedDraws(examples, schedule, images, t, eps.__getitem__, batch_size)


def losses_by_range(
    models: Sequence[Path], ranges: Sequence[TimestepRange], source: str, *, num: int = 2048
) -> dict[Path, tuple[float, ...]]:
    """The held-out loss of each artifact of a pixel model on each range, all on the same draws."""
    losses = {}
    for path in models:
        denoiser = load_denoiser(path)
        images = open_images(source, shape=denoiser.sample_shape, split="held-out")
        values = []
        for span in ranges:
            draws = draws_of_range(PixelExamples(images), span, denoiser.schedule, num)
            assert draws is not None
            values.append(draws.loss(denoiser.network))
        losses[path] = tuple(values)
    return losses
