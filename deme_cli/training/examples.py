"""What a run learns from: clean x_0 with what the network is told of it, pixels and latents alike.

A draw is a function of the images asked for, the mirrored ones among them, and a generator, from
which the crops come first and then the noise of the VAE's posterior. Without a generator there is
no chance in it: centre crops and the mean of the posterior, as held-out losses are measured.

A cache is a folder of shards, safetensors files of some hundred images each, written whole and read
row by row: the posterior's mean and standard deviation (float32) of each image, and of its mirror
image where a run flips, the conditions as the network takes them, and the null. Its record carries
the *key*: what the numbers depend on. A cache with another key is refused, never used.
B batch, C channels, h x w of x_0 (latents where there is a VAE), H x W of the images.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import DenoiserRecord, Record, fingerprint_file, write_artifact
from deme_cli.config import DataConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.data.fitting import CENTRE, Shape, crop_corner
from deme_cli.data.images import ImageData, open_images, to_unit
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.model_files import digests_of, locate_parts
from deme_cli.distributed import ALONE, JointStopRequests, Lost, World
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.files import read_header, require_space
from deme_cli.jobs import claim

WHOLE = slice(None)  # of a batch
SIZES = "time_ids"  # SDXL's keyword for the sizes of an image and its crop
FOLDER = ".deme-cache"
ROWS, LEAST_ROWS = 256, 32  # images of a shard; fewer where they are large
MIRRORED = "mirrored_"
_SHARD_PIXELS = 1 << 26  # 256 images of 512 x 512, 64 of 1024 x 1024
_OPEN_SHARDS = 64  # shards mapped at a time
_PIXELS = 1 << 20  # encoded at a time: four images of 512 x 512
_LARGEST_BATCH = 32
_POLL_SECONDS = 0.2
AnyRecord = TypeVar("AnyRecord", bound=DenoiserRecord)


class PixelExamples:
    """Images as they are, in [-1, 1], for models that draw pixels from noise alone."""

    runs_vae = False  # whether drawing sends images through the VAE, which is on the device

    def __init__(self, data: ImageData, *, crop: str = "centre") -> None:
        self.data, self.crop = data, crop
        self.source, self.fingerprint = data.source, data.fingerprint
        self.can_flip, self.shape, self.image_shape = data.can_flip, data.shape, data.shape

    def __len__(self) -> int:
        return len(self.data)

    def draw(
        self, indices: Sequence[int], *, flip: Tensor | None, generator: torch.Generator | None,
        share: slice = WHOLE,
    ) -> tuple[Tensor, Conditions]:  # fmt: skip
        """x_0 (B, C, H, W) of the images `indices`, no conditions; flip (B,): which to mirror.

        Of a `share` of the batch, what they are in the whole: chance is drawn for all of it.
        """
        crops = draw_crops(self.crop, len(indices), generator)
        images = self.data.batch(indices[share], None if crops is None else crops[share])
        return mirror(to_unit(images), None if flip is None else flip[share]), {}

    def null(self) -> Conditions:
        return {}


class LatentExamples(PixelExamples):
    """VAE latents (C, h, w) and conditions of images, from the frozen parts or from a `cache`.

    Centre crops come with their latents from the cache; of random crops, of which there would be
    too many, only what is said of the image does, and the frozen parts are asked for the rest.
    """

    def __init__(
        self, data: ImageData, companions: Companions, shape: Shape, *, crop: str = "centre",
        cache: LatentCache | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data, crop=crop)
        self.companions, self.cache, self.shape = companions, cache, shape
        self.runs_vae = cache is None or crop != "centre"
        self._null: Conditions | None = None

    def draw(
        self, indices: Sequence[int], *, flip: Tensor | None, generator: torch.Generator | None,
        share: slice = WHOLE,
    ) -> tuple[Tensor, Conditions]:  # fmt: skip
        """As of `PixelExamples`, with the conditions (B, ...) of each image."""
        num, crops = len(indices), draw_crops(self.crop, len(indices), generator)
        crops = None if crops is None else crops[share]
        indices, flip = indices[share], None if flip is None else flip[share]
        if self.cache is None:
            conditions = self.encode_conditions(indices, flip, crops)
        else:
            conditions = self.cache.conditions(indices)
            if crops is not None and SIZES in conditions:  # the text stays, the crop is new
                sizes = self._sizes(indices, flip, crops)
                conditions[SIZES] = sizes.to(conditions[SIZES])
        if self.cache is None or self.runs_vae:
            mean, deviation = self.posterior(indices, flip, crops)
        else:
            mean, deviation = self.cache.posterior(indices, flip)
        noise = None
        if generator is not None:
            noise = torch.randn((num, *mean.shape[1:]), generator=generator)[share]
        return self.companions.latents(mean, deviation, noise), conditions

    def posterior(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior, by the VAE.  (B, C, h, w) each

        flip: (B,) which images are mirrored; crops: (B, 2) where they are cut, None at the centre.
        """
        return self.companions.encode_images(mirror(to_unit(self.data.batch(indices, crops)), flip))

    def encode_conditions(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditions:
        """What the network is told of the images, of batch B, by the text encoders."""
        companions = self.companions
        if companions.wants == "nothing":
            return {}
        of_images = self.data.captions if companions.wants == "text" else self.data.labels
        # sizes only where the network is told them, for every image's header is read for that
        has_sizes = SIZES in companions.backbone.condition_shapes(companions.record.model_config)
        sizes = self._sizes(indices, flip, crops) if has_sizes else None
        return companions.conditions(of_images(indices), sizes)

    def _sizes(self, indices: Sequence[int], flip: Tensor | None, crops: Tensor | None) -> Tensor:
        """Original height and width, crop top and left, target height and width.  (B, 6) int64

        A mirrored image is the mirror image of the same crop, so its crop begins as far from the
        left as the original's ended from the right.
        """
        rows, shape = [], self.data.shape
        for place, size in enumerate(self.data.sizes(indices)):
            x, y = CENTRE if crops is None else crops[place].tolist()
            x = 1 - x if flip is not None and flip[place] else x
            rows.append([*size, *crop_corner(size, shape, (x, y)), *shape[1:]])
        return torch.tensor(rows, dtype=torch.long)

    def null(self) -> Conditions:
        """The condition of nothing said, of batch 1; made once."""
        if self._null is None:
            self._null = self.companions.null() if self.cache is None else self.cache.null()
        return self._null


Examples = PixelExamples


def mirror(images: Tensor, flip: Tensor | None) -> Tensor:
    """`images` (B, C, H, W) with those where `flip` (B,) is true mirrored left to right."""
    if flip is None:
        return images
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def draw_crops(crop: str, num: int, generator: torch.Generator | None) -> Tensor | None:
    """Where random crops lie, x and y in [0, 1]: (num, 2); None for the centre."""
    if crop == "centre" or generator is None:
        return None
    return torch.rand(num, 2, generator=generator)


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
    has_latents = bool(backbone.parts)
    is_cached = cache != "off" and has_latents and (crop == "centre" or companions.wants == "text")
    data = open_images(
        images.source, shape=companions.image_shape(shape), split=split, wants=companions.wants,
        captions=images.captions, keep=crop == "centre" and not is_cached,
    )  # fmt: skip
    _require_classes(data, companions.num_classes)
    if companions.wants == "text":
        companions.tell_cut(data.captions(range(len(data))), f"{data.source}: {split} captions")
    if not has_latents:
        return PixelExamples(data, crop=crop)
    if not is_cached:
        return LatentExamples(data, companions, shape, crop=crop)
    companions.require_same("vae")  # whose scales are read even where the rest is cached
    key = {
        **companions.record.companions,
        "pipeline": backbone.pipeline,
        "data": data.fingerprint,  # captions count by what they say
        "split": split,
        "num_images": len(data),
        "resolution": list(data.shape[1:]),
        "crop": crop,
        "dtype": str(companions.dtype).removeprefix("torch."),
        "flips": (data.can_flip if flips is None else flips) and crop == "centre",
        "rows": min(ROWS, max(LEAST_ROWS, _SHARD_PIXELS // math.prod(data.shape[1:]))),
    }
    folder = Path(cache).expanduser() / split
    if cache == "auto":
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = beside / FOLDER / name
    kept = LatentCache(folder, key, min(len(data), num_needed or len(data)))
    return LatentExamples(data, companions, shape, crop=crop, cache=kept)


def _require_classes(data: ImageData, known: int | None) -> None:
    """Check that the `known` classes of a model, if it has any, are enough for the images."""
    if known is None:
        return
    if (data.num_classes or 0) > known:
        beyond = {n: name for n, name in data.classes.items() if n >= known}
        number, name = min(beyond.items())
        raise ArtifactError(
            f"{data.source}: images of {data.num_classes} classes, this model knows {known}, from "
            f"0 to {known - 1}, not {number} ({name}); name the column of the classes with "
            f"--captions, or choose other images"
        )
    if len(data.classes) < known:
        are_names = any(name != str(number) for number, name in data.classes.items())
        console.note_once(
            f"{data.source}: {len(data.classes)} of the {known} classes that this model knows"
            + "; where its numbers are others, name the folders or labels by them" * are_names
        )


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Record):
    """The header of a shard: images start .. stop - 1 under `key`. Not an artifact kind."""

    kind: ClassVar[str] = "latent-cache"
    key: dict[str, Any]
    start: int
    stop: int


class LatentCache:
    """The shards of `key` in `folder`, as many as hold the first `num_needed` images."""

    def __init__(self, folder: Path, key: dict[str, Any], num_needed: int) -> None:
        self.folder, self.key = folder, key
        rows, total = key["rows"], key["num_images"]
        self.spans = [
            range(start, min(start + rows, total)) for start in range(0, num_needed, rows)
        ]
        self.sound: set[int] = set()  # shards that this process has written, or checked
        self.open = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def has(self, shard: int) -> bool:
        """Whether a shard is there, whole, and of this cache; its bytes are read once for that.

        A file that is not whole counts as not there. Raises ArtifactError for a shard of another
        cache, naming the first thing that differs, or with other bytes than were written.
        """
        path, span = self.path(shard), self.spans[shard]
        if shard in self.sound or not path.exists():
            return shard in self.sound
        try:
            document = json.loads(read_header(path).metadata.get("deme", "{}"))
        except (ArtifactError, json.JSONDecodeError):
            return False
        key = document.get("key")
        if document.get("kind") != ShardRecord.kind or not isinstance(key, dict):
            raise ArtifactError(f"{path}: not a cache of latents; choose another folder: --cache")
        for name in [*self.key, *key]:
            if key.get(name) != self.key.get(name):
                what = "other images or captions" if name == "data" else f"another {name}"
                raise ArtifactError(
                    f"{self.folder}: this cache was made with {what} ({str(key.get(name))[:12]}, "
                    f"not {str(self.key.get(name))[:12]}); give another folder with --cache, or "
                    f"remove this one"
                )
        written = (document.get("start"), document.get("stop"), document.get("fingerprint"))
        if written != (span.start, span.stop, fingerprint_file(path)):
            raise ArtifactError(
                f"{path}: this part of the latents' cache is corrupt; remove the file and run the "
                f"same command again to make it anew"
            )
        self.sound.add(shard)
        return True

    def _open(self, shard: int) -> Any:
        assert self.has(shard), f"{self.path(shard)} is read before the cache is filled"
        return safe_open(self.path(shard), "pt")

    def posterior(self, indices: Sequence[int], flip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior.  (B, C, h, w) float32 each"""
        flips = [False] * len(indices) if flip is None else flip.tolist()
        names = [MIRRORED * mirrored for mirrored in flips]
        mean = self._rows(indices, [f"{mirrored}mean" for mirrored in names])
        return mean, self._rows(indices, [f"{mirrored}deviation" for mirrored in names])

    def conditions(self, indices: Sequence[int]) -> Conditions:
        """What the network is told of the images, of batch B."""
        names = [name for name in self.open(0).keys() if name.startswith("condition.")]  # noqa: SIM118
        return {
            n.removeprefix("condition."): self._rows(indices, [n] * len(indices)) for n in names
        }

    def null(self) -> Conditions:
        """The condition of nothing said, of batch 1."""
        shard = self.open(0)
        names = [name for name in shard.keys() if name.startswith("null.")]  # noqa: SIM118
        return {name.removeprefix("null."): shard.get_tensor(name) for name in names}

    def _rows(self, indices: Sequence[int], names: Sequence[str]) -> Tensor:
        """One row of each image, from the tensor of its name."""
        places = [divmod(int(index), self.key["rows"]) for index in indices]
        rows = zip(places, names, strict=True)
        return torch.stack([self.open(shard).get_slice(name)[row] for (shard, row), name in rows])


def fill_caches(
    *examples: Examples | None, world: World = ALONE, progress: Progress = silent
) -> None:
    """Make what the caches behind these examples lack, if they have any, telling their images.

    Several processes make it together. Raises Stopped after a signal (what is made stays), Lost
    where another process of the launch has ended, ArtifactError for a shard that is corrupt or of
    another cache, MissingError where the disk is too small for the rest.
    """
    cached = [(one, one.cache) for one in examples if isinstance(one, LatentExamples) and one.cache]
    total, before = sum(cache.spans[-1].stop for _, cache in cached), 0
    with JointStopRequests(world) as requests:
        for one, cache in cached:
            for done in _fill(one, cache):
                progress(Step(before + done, total, "caching latents", "image"))
                if world.failure():
                    raise Lost("another process of this launch ended while latents were cached")
                if requests.asked:
                    raise requests.stopped(
                        f"stopped at {before + done} of {total} images whose latents are cached; "
                        f"run the same command again to continue"
                    )
            before += cache.spans[-1].stop
    for one, _ in cached:
        if not one.runs_vae:
            one.companions.release()  # gigabytes that training does not read


def _fill(examples: LatentExamples, cache: LatentCache) -> Iterator[int]:
    """Make the missing shards of a cache; yields the images of it that are there, now and then.

    Beside other processes that do the same: each shard is claimed by who makes it. One that
    somebody else has claimed is passed by and looked at again in the end; if its maker died, its
    claim is free and it is made here. Batches lie in the same places whoever makes them, so a cache
    has the same bytes however often it was broken off.
    """
    missing, num_done = [], 0
    for shard, span in enumerate(cache.spans):
        if cache.has(shard):
            num_done += len(span)
            yield num_done
        else:
            missing.append(shard)
    num_missing = sum(len(cache.spans[shard]) for shard in missing)
    null: Conditions | None = None
    while missing:
        claimed_by_others = []
        for shard in missing:
            with ExitStack() as stack:
                try:
                    stack.enter_context(claim(cache.path(shard).with_suffix("")))
                except ConfigError:
                    claimed_by_others.append(shard)
                    continue
                if not cache.has(shard):
                    parts, span = list[dict[str, Tensor]](), cache.spans[shard]
                    for num, part in _encode(examples, span):
                        if null is None:
                            null = examples.companions.null()
                            size = sum(tensor.nbytes for tensor in part.values()) // num
                            require_space(cache.folder / "latents", size * num_missing)
                        parts.append(part)
                        yield num_done + num
                    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                    tensors |= {f"null.{name}": value.cpu() for name, value in (null or {}).items()}
                    record = ShardRecord(key=cache.key, start=span.start, stop=span.stop)
                    write_artifact(cache.path(shard), tensors, record)
                    cache.sound.add(shard)
            num_done += len(cache.spans[shard])
            yield num_done
        if claimed_by_others == missing:
            time.sleep(_POLL_SECONDS)
        missing = claimed_by_others


def _encode(examples: LatentExamples, span: range) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Images of `span` so far, and their tensors on the CPU, batch by batch."""
    size = max(1, min(_LARGEST_BATCH, _PIXELS // math.prod(examples.image_shape[1:])))
    for start in range(span.start, span.stop, size):
        indices = range(start, min(start + size, span.stop))
        tensors = {f"condition.{n}": c for n, c in examples.encode_conditions(indices).items()}
        if not examples.runs_vae:
            tensors["mean"], tensors["deviation"] = examples.posterior(indices)
        if examples.cache is not None and examples.cache.key["flips"]:
            mirrored = examples.posterior(indices, torch.ones(len(indices), dtype=torch.bool))
            tensors[f"{MIRRORED}mean"], tensors[f"{MIRRORED}deviation"] = mirrored
        yield indices.stop - span.start, {name: tensor.cpu() for name, tensor in tensors.items()}
