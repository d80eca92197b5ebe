"""What a run learns from: clean x_0 with what the network is told of it, pixels and latents alike.

B batch, C channels, h x w of x_0 (latents where there is a VAE), H x W of the images. A draw is a
function of the images asked for, the mirrored ones among them, and a generator, from which the
crops come first and then the noise of the VAE's posterior. Without a generator there is no chance
in it: centre crops and the mean of the posterior, as held-out losses are measured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import DataConfig
from deme_cli.data.fitting import Shape
from deme_cli.data.images import ImageData, open_images, to_unit
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.model_files import digests_of, locate_parts
from deme_cli.distributed import ALONE, JointStopRequests, Lost, World
from deme_cli.errors import ArtifactError
from deme_cli.training.latents import Encoder, LatentCache, cache_folder, cache_key, fill, mirror

WHOLE = slice(None)  # of a batch
_CHUNK = 4096  # images copied to a device at a time
AnyRecord = TypeVar("AnyRecord", bound=DenoiserRecord)


class Examples(Protocol):
    """Numbered (x_0, conditions). `fingerprint` is that of the images and what they show."""

    source: str
    fingerprint: str
    can_flip: bool  # whether a mirrored image is as good as the original
    shape: Shape  # (C, h, w) of x_0
    image_shape: Shape  # (C, H, W) of the images behind it
    crop: str  # centre or random
    runs_vae: bool  # whether drawing sends images through the VAE, which is on the device

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
        self._resident: Tensor | None = None  # all images, uint8 (N, C, H, W), on a device

    def keep_on(self, device: torch.device) -> None:
        """Draw on `device` from here on, where the centre crops of all images are kept."""
        shape = (len(self.data), *self.data.shape)
        self._resident = torch.empty(shape, dtype=torch.uint8, device=device)
        for start in range(0, len(self.data), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(self.data)))
            self._resident[start : numbers.stop] = self.data.batch(numbers).to(device)

    def __len__(self) -> int:
        return len(self.data)

    def draw(
        self, indices: Sequence[int], *, flip: Tensor | None, generator: torch.Generator | None,
        share: slice = WHOLE,
    ) -> tuple[Tensor, Conditions]:  # fmt: skip
        crops, flip = draw_crops(self.crop, len(indices), generator), _part(flip, share)
        if self._resident is None or crops is not None:
            images = self.data.batch(indices[share], _part(crops, share))
        else:
            device, numbers = self._resident.device, torch.as_tensor(indices[share])
            images = self._resident[send(numbers.long(), device)]
            flip = None if flip is None else send(flip, device)
        return mirror(to_unit(images), flip), {}

    def null(self) -> Conditions:
        return {}


class LatentExamples:
    """VAE latents and conditions of images, from the frozen parts or from a cache of theirs."""

    def __init__(self, encoder: Encoder | LatentCache, *, crop: str = "centre") -> None:
        self.encoder, self.crop, data = encoder, crop, encoder.data
        self.source, self.fingerprint, self.can_flip = data.source, data.fingerprint, data.can_flip
        self.shape, self.image_shape = encoder.latent_shape, data.shape
        self.runs_vae, self.null = encoder.runs_vae, encoder.null

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


def draw_crops(crop: str, num: int, generator: torch.Generator | None) -> Tensor | None:
    """Where random crops lie, x and y in [0, 1]: (num, 2); None for the centre."""
    if crop == "centre" or generator is None:
        return None
    return torch.rand(num, 2, generator=generator)


def _part(values: Tensor | None, share: slice) -> Tensor | None:
    """The rows of a share, where there are any."""
    return None if values is None else values[share]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for a GPU, as copies from pinned memory do not."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def name_companions(record: AnyRecord, pipeline: str | None) -> AnyRecord:
    """`record` with the digests of its frozen parts, where it was imported without them.

    Raises MissingError if they are neither where the model came from nor in `pipeline`.
    """
    parts = backbone_of(record.model_config).parts
    if record.companions or not parts:
        return record
    return replace(record, companions=digests_of(locate_parts(pipeline or record.source, parts)))


def open_examples(
    images: DataConfig, companions: Companions, *, split: str, flips: bool | None = False,
    cache: str = "off", beside: Path = Path("."), num_needed: int | None = None,
) -> Examples:  # fmt: skip
    """The examples of a split of `images` for the model that `companions` belong to.

    flips: whether mirrored images will be asked for; None where the images allow it. cache: `auto`
    (in a hidden folder in `beside`), `off` or a folder; it holds the first `num_needed` images.
    Raises ConfigError where the model cannot take the resolution, ArtifactError on captions or
    classes that are missing, MissingError on data that is.
    """
    record, backbone = companions.record, companions.backbone
    shape = companions.latent_shape(backbone.sample_shape(record.model_config), images.resolution)
    crop = images.crop if split == "train" else "centre"
    is_cached = cache != "off" and (crop == "centre" or companions.wants == "text")
    has_latents = bool(backbone.parts)
    data = open_images(
        images.source, shape=companions.image_shape(shape), split=split, wants=companions.wants,
        captions=images.captions, keep=crop == "centre" and not (is_cached and has_latents),
    )  # fmt: skip
    _require_classes(data, companions)
    if companions.wants == "text":
        companions.tell_cut(data.captions(range(len(data))), f"{data.source}: {split} captions")
    if not has_latents:
        return PixelExamples(data, crop=crop)
    encoder = Encoder(data, companions, shape)
    if not is_cached:
        return LatentExamples(encoder, crop=crop)
    companions.require_same("vae")  # whose scales are read even where the rest is cached
    flips, num = data.can_flip if flips is None else flips, len(data)
    key = cache_key(encoder, split=split, crop=crop, flips=flips)
    folder = cache_folder(cache, beside, key)
    kept = LatentCache(encoder, folder, key, num_needed=min(num, num_needed or num))
    return LatentExamples(kept, crop=crop)


def _require_classes(data: ImageData, companions: Companions) -> None:
    known = companions.num_classes
    if known is None:
        return
    if (data.num_classes or 0) > known:
        beyond = {n: name for n, name in data.classes.items() if n >= known}
        shown = ", ".join(f"{n} ({name})" if name != str(n) else name for n, name in beyond.items())
        shown = textwrap.shorten(shown, 60, placeholder=" …")
        raise ArtifactError(
            f"{data.source}: images of {data.num_classes} classes, this model knows {known}, from "
            f"0 to {known - 1}, not {shown}; name the column of the "
            f"classes with --captions, or choose other images"
        )
    if len(data.classes) < known:
        are_names = any(name != str(number) for number, name in data.classes.items())
        console.note_once(
            f"{data.source}: {len(data.classes)} of the {known} classes that this model knows"
            + "; where its numbers are others, name the folders or labels by them" * are_names
        )


def cache_size(*examples: Examples | None) -> int:
    """Images that the caches behind these examples will hold together."""
    return sum(one.num_images for one in _cached(examples))


def fill_caches(*examples: Examples | None, world: World = ALONE) -> Iterator[int]:
    """Make what the caches behind these examples lack; yields the images that they hold by now.

    Several processes make it together. Raises Stopped after a signal (what is made stays), Lost
    where another process of the launch has ended, and what `fill` raises.
    """
    cached, before, total = _cached(examples), 0, cache_size(*examples)
    with JointStopRequests(world) as requests:
        for one in cached:
            for done in fill(one):
                yield before + done
                if world.failure():
                    raise Lost("another process of this launch ended while latents were cached")
                if requests.asked:
                    raise requests.stopped(
                        f"stopped at {before + done} of {total} images; of their latents whole "
                        f"parts of {one.key['rows']} are kept; run the same command again "
                        f"to continue"
                    )
            before += one.num_images
    for one in cached:
        if one.holds_latents:
            one.companions.release()  # gigabytes that training does not read


def _cached(examples: Sequence[Examples | None]) -> list[LatentCache]:
    return [
        one.encoder for one in examples
        if isinstance(one, LatentExamples) and isinstance(one.encoder, LatentCache)
    ]  # fmt: skip
