"""The random draws of training: which images, which timesteps, which noise, which are mirrored.

Every draw is a function of (seed, range, update) alone, so that a resumed run needs no generator
state and continues bit for bit. Images are visited in epochs, each a permutation of all of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from deme_cli.config import FinetuneConfig
from deme_cli.data.images import ImageData, to_unit
from deme_cli.timesteps import TimestepRange
from deme_cli.training.objective import draw_timesteps


@dataclass(frozen=True)
class Batch:
    """x0, eps: (B, C, H, W) with x0 in [-1, 1]; t: (B,)."""

    x0: Tensor
    eps: Tensor
    t: Tensor


def derived_generator(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of `parts`."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class BatchSource:
    """Draws the batches of one run. `micro` counts batches within an accumulated update."""

    def __init__(
        self, data: ImageData, span: TimestepRange, num_train_timesteps: int,
        config: FinetuneConfig, *, flip: bool,
    ) -> None:  # fmt: skip
        self.data, self.span, self.config, self.flip = data, span, config, flip
        self.num_train_timesteps = num_train_timesteps
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of update `step` (from 0), accumulation part `micro`."""
        config = self.config
        generator = derived_generator(config.seed, self.span, step, micro)
        count = step * config.accumulation + micro
        images = self.data.batch(self._indices(count * config.batch_size, config.batch_size))
        t = draw_timesteps(
            config.batch_size,
            self.span,
            self.num_train_timesteps,
            p=config.p,
            per_batch=config.timesteps == "per-batch",
            antithetic=config.antithetic,
            generator=generator,
        )
        x0 = to_unit(images)
        if self.flip:
            mirrored = torch.rand(len(x0), generator=generator) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return Batch(x0, torch.randn(x0.shape, generator=generator), t)

    def _indices(self, start: int, num: int) -> list[int]:
        """Images start .. start + num - 1 of the endless sequence of epochs."""
        chosen: list[int] = []
        while len(chosen) < num:
            epoch, offset = divmod(start + len(chosen), len(self.data))
            if epoch != self._epoch:
                generator = derived_generator(self.config.seed, self.span, "epoch", epoch)
                self._order = torch.randperm(len(self.data), generator=generator)
                self._epoch = epoch
            chosen += self._order[offset : offset + num - len(chosen)].tolist()
        return chosen
