"""What a run learns from: clean x_0 with what the network is told of it, pixels and latents alike.

B batch, C channels, h x w of x_0 (latents where there is a VAE), H x W of the images. A draw is a
function of the images asked for, the mirrored ones among them, and a generator, from which the
crops come first and then the noise of the VAE's posterior. Without a generator there is no chance
in it: centre crops and the mean of the posterior, as held-out losses are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deme_cli.data.fitting import Shape
from deme_cli.data.images import ImageData, to_unit
from deme_cli.diffusion.conditions import Conditions
from deme_cli.training.encoder import Encoder, mirror
from deme_cli.training.latent_cache import CachedEncoder
from deme_cli.training.on_device import ResidentImages, send

WHOLE = slice(None)  # of a batch


class Examples(Protocol):
    """Numbered (x_0, conditions). `fingerprint` is that of the images and what they show."""

    source: str
    fingerprint: str
    can_flip: bool  # whether a mirrored image is as good as the original
    shape: Shape  # (C, h, w) of x_0
    image_shape: Shape  # (C, H, W) of the images behind it
    crop: str  # centre or random

    @property
    def runs_vae(self) -> bool:
        """Whether drawing sends images through the VAE, which is on the device."""
        ...

    def __len__(self) -> int: ...

    def draw(
        self, indices: Sequence[int], *, flip: Tensor | None, generator: torch.Generator | None,
        share: slice = WHOLE,
    ) -> tuple[Tensor, Conditions]:  # fmt: skip
        """x_0 (B, C, h, w) and conditions of the images `indices`; flip (B,): which to mirror.

        Of a `share` of the batch, what they are in the whole: chance is drawn for all of it.
        """
        ...

    def null(self) -> Conditions:
        """The condition of nothing said, of batch 1; {} for unconditional models."""
        ...


class PixelExamples:
    """Images as they are, in [-1, 1], for models that draw pixels from noise alone."""

    runs_vae = False

    def __init__(self, data: ImageData, *, crop: str = "centre") -> None:
        self.data, self.crop = data, crop
        self.source, self.fingerprint = data.source, data.fingerprint
        self.can_flip, self.shape, self.image_shape = data.can_flip, data.shape, data.shape
        self._resident: ResidentImages | None = None

    def keep_on(self, device: torch.device) -> None:
        """Draw on `device` from here on, where the centre crops of all images are kept."""
        self._resident = ResidentImages(self.data, device)

    def __len__(self) -> int:
        return len(self.data)

    def draw(
        self, indices: Sequence[int], *, flip: Tensor | None, generator: torch.Generator | None,
        share: slice = WHOLE,
    ) -> tuple[Tensor, Conditions]:  # fmt: skip
        crops = draw_crops(self.crop, len(indices), generator)
        flip = _part(flip, share)
        if self._resident is not None and crops is None:
            images = self._resident.batch(indices[share])
            flip = None if flip is None else send(flip, images.device)
        else:
            images = self.data.batch(indices[share], _part(crops, share))
        return mirror(to_unit(images), flip), {}

    def null(self) -> Conditions:
        return {}


class LatentExamples:
    """VAE latents and conditions of images, from the frozen parts or from a cache of theirs."""

    def __init__(self, encoder: Encoder | CachedEncoder, *, crop: str = "centre") -> None:
        self.encoder, self.crop = encoder, crop
        data = encoder.data
        self.source, self.fingerprint, self.can_flip = data.source, data.fingerprint, data.can_flip
        self.shape, self.image_shape = encoder.latent_shape, data.shape

    @property
    def runs_vae(self) -> bool:
        return self.encoder.runs_vae

    def __len__(self) -> int:
        return len(self.encoder.data)

    def draw(
        self, indices: Sequence[int], *, flip: Tensor | None, generator: torch.Generator | None,
        share: slice = WHOLE,
    ) -> tuple[Tensor, Conditions]:  # fmt: skip
        num, crops = len(indices), _part(draw_crops(self.crop, len(indices), generator), share)
        indices, flip = indices[share], _part(flip, share)
        mean, deviation = self.encoder.posterior(indices, flip, crops)
        conditions = self.encoder.conditions(indices, flip, crops)
        noise = None
        if generator is not None:
            noise = torch.randn((num, *mean.shape[1:]), generator=generator)[share]
        return self.encoder.companions.latents(mean, deviation, noise), conditions

    def null(self) -> Conditions:
        return self.encoder.null()


def draw_crops(crop: str, num: int, generator: torch.Generator | None) -> Tensor | None:
    """Where random crops lie, x and y in [0, 1]: (num, 2); None for the centre."""
    if crop == "centre" or generator is None:
        return None
    return torch.rand(num, 2, generator=generator)


def _part(values: Tensor | None, share: slice) -> Tensor | None:
    """The rows of a share, where there are any."""
    return None if values is None else values[share]
