"""Images and what they show, through the frozen parts: VAE posteriors and text or class conditions.

B batch, C channels, h x w of latents, H x W of images. A mirrored image is the mirror image of the
same crop, so to SDXL its crop begins as far from the left as the original's ended from the right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deme_cli.data.fitting import CENTRE, Shape, crop_corner
from deme_cli.data.images import ImageData, to_unit
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.conditions import Conditions

SIZES = "time_ids"  # SDXL's keyword for the sizes of an image and its crop


class Encoder:
    """`data` as the frozen parts see it; `latent_shape` (C, h, w) is that of its latents."""

    runs_vae = True

    def __init__(self, data: ImageData, companions: Companions, latent_shape: Shape) -> None:
        self.data, self.companions, self.latent_shape = data, companions, latent_shape
        self._null: Conditions | None = None

    def posterior(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior.  (B, C, h, w) each

        flip: (B,) which images are mirrored; crops: (B, 2) where they are cut, None at the centre.
        """
        images = mirror(to_unit(self.data.batch(indices, crops)), flip)
        return self.companions.encode_images(images)

    def conditions(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditions:
        """What the network is told of the images, of batch B."""
        wants = self.companions.wants
        if wants == "nothing":
            return {}
        subjects = self.data.captions(indices) if wants == "text" else self.data.labels(indices)
        sizes = self.geometry(indices, flip, crops) if self._tells_sizes else None
        return self.companions.conditions(subjects, sizes)

    @property
    def _tells_sizes(self) -> bool:
        """Whether the network is told sizes, for which every image's header is read."""
        companions = self.companions
        return SIZES in companions.backbone.condition_shapes(companions.record.model_config)

    def geometry(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> Tensor:
        """Original height and width, crop top and left, target height and width.  (B, 6) int64"""
        _, height, width = self.data.shape
        rows = []
        for place, size in enumerate(self.data.sizes(indices)):
            x, y = CENTRE if crops is None else crops[place].tolist()
            if flip is not None and flip[place]:
                x = 1 - x
            rows.append([*size, *crop_corner(size, self.data.shape, (x, y)), height, width])
        return torch.tensor(rows, dtype=torch.long)

    def null(self) -> Conditions:
        """The condition of nothing said, of batch 1; made once."""
        if self._null is None:
            self._null = self.companions.null()
        return self._null


def mirror(images: Tensor, flip: Tensor | None) -> Tensor:
    """`images` (B, C, H, W) with those where `flip` (B,) is true mirrored left to right."""
    if flip is None:
        return images
    return torch.where(flip[:, None, None, None], images.flip(-1), images)
