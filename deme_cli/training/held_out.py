"""The denoising loss on images that training never sees, on the same draws every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deme_cli.data.images import ImageData, open_images, to_unit
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.diffusion.schedule import NoiseSchedule, add_noise
from deme_cli.timesteps import TimestepRange

_BATCH = 256


@dataclass(frozen=True)
class HeldOutLoss:
    """Fixed draws (x_t, t, target) of one range.  x_t, target: (n, C, H, W)   t: (n,)"""

    x_t: Tensor
    t: Tensor
    target: Tensor

    @classmethod
    def of(
        cls, data: ImageData | None, span: TimestepRange, schedule: NoiseSchedule, num: int
    ) -> HeldOutLoss | None:
        """`num` draws with timesteps spread evenly over the range; None without images or draws."""
        if data is None or num == 0 or len(data) == 0:
            return None
        generator = torch.Generator().manual_seed(0)
        x0 = to_unit(data.batch([index % len(data) for index in range(num)]))
        eps = torch.randn(x0.shape, generator=generator)
        t = span.start + torch.arange(num) * len(span) // num
        t = t[torch.randperm(num, generator=generator)]
        return cls(add_noise(x0, eps, t, schedule.alphas_cumprod), t, schedule.target(x0, eps, t))

    @torch.no_grad()
    def of_weights(self, network: nn.Module, weights: Mapping[str, Tensor]) -> float:
        """Mean squared error of `network` with other `weights`, over all draws and elements."""
        device, total = next(network.parameters()).device, 0.0
        for x_t, t, target in zip(
            self.x_t.split(_BATCH), self.t.split(_BATCH), self.target.split(_BATCH), strict=True
        ):
            inputs = (x_t.to(device), t.to(device))
            output = functional_call(network, dict(weights), inputs, {"return_dict": False})[0]
            total += (output - target.to(device)).square().double().sum().item()
        return total / self.target.numel()


def losses_by_range(
    models: Sequence[Path], ranges: Sequence[TimestepRange], source: str, *, num: int = 2048
) -> dict[Path, tuple[float, ...]]:
    """The held-out loss of each model artifact on each range, all on the same draws."""
    losses = {}
    for path in models:
        denoiser = load_denoiser(path)
        images = open_images(source, shape=denoiser.sample_shape, split="held-out")
        weights = denoiser.network.state_dict()
        values = []
        for span in ranges:
            draws = HeldOutLoss.of(images, span, denoiser.schedule, num)
            assert draws is not None
            values.append(draws.of_weights(denoiser.network, weights))
        losses[path] = tuple(values)
    return losses
