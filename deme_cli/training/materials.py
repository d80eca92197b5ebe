"""What a run draws from, opened: the frozen parts, the images of a split, and the cache of both."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from deme_cli import console
from deme_cli.artifacts import DenoiserRecord
from deme_cli.config import DataConfig
from deme_cli.data.images import ImageData, open_images
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.model_files import digests_of, locate_parts
from deme_cli.distributed import ALONE, JointStopRequests, Lost, World
from deme_cli.errors import ArtifactError
from deme_cli.training.cache_filling import fill
from deme_cli.training.encoder import Encoder
from deme_cli.training.examples import Examples, LatentExamples, PixelExamples
from deme_cli.training.latent_cache import CachedEncoder, LatentCache, cache_key, cache_place

AnyRecord = TypeVar("AnyRecord", bound=DenoiserRecord)


def name_companions(record: AnyRecord, pipeline: str | None) -> AnyRecord:
    """`record` with the digests of its frozen parts, where it was imported without them.

    Raises MissingError if they are neither where the model came from nor in `pipeline`.
    """
    parts = backbone_of(record.model_config).parts
    if record.companions or not parts:
        return record
    return replace(record, companions=digests_of(locate_parts(pipeline or record.source, parts)))


def open_examples(
    images: DataConfig,
    companions: Companions,
    *,
    split: str,
    flips: bool | None = False,
    cache: str = "off",
    beside: Path = Path("."),
    num_needed: int | None = None,
) -> Examples:
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
        images.source,
        shape=companions.image_shape(shape),
        split=split,
        wants=companions.wants,
        captions=images.captions,
        keep=crop == "centre" and not (is_cached and has_latents),
    )
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
    kept = LatentCache(cache_place(cache, beside, key), key, num_needed=min(num, num_needed or num))
    return LatentExamples(CachedEncoder(encoder, kept), crop=crop)


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
    return sum(one.cache.num_images for one in _cached(examples))


def fill_caches(*examples: Examples | None, world: World = ALONE) -> Iterator[int]:
    """Make what the caches behind these examples lack; yields the images that they hold by now.

    Several processes make it together. Raises Stopped after a signal (what is made stays), Lost
    where another process of the launch has ended, and what `fill` raises.
    """
    cached, before, total = _cached(examples), 0, cache_size(*examples)
    with JointStopRequests(world) as requests:
        for one in cached:
            for done in fill(one.cache, one.encoder):
                yield before + done
                if world.failure():
                    raise Lost("another process of this launch ended while latents were cached")
                if requests.asked:
                    raise requests.stopped(
                        f"stopped at {before + done} of {total} images; of their latents whole "
                        f"parts of {one.cache.key['rows']} are kept; run the same command again "
                        f"to continue"
                    )
            before += one.cache.num_images
    for one in cached:
        if one.cache.holds_latents:
            one.companions.release()  # gigabytes that training does not read


def _cached(examples: Sequence[Examples | None]) -> list[CachedEncoder]:
    return [
        one.encoder for one in examples
        if isinstance(one, LatentExamples) and isinstance(one.encoder, CachedEncoder)
    ]  # fmt: skip
