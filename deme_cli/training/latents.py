"""Images through the frozen parts (VAE posteriors, text or class conditions), and a cache of both.

A cache is a folder of shards, safetensors files of some hundred images each, written whole and read
row by row. A shard holds the posterior's mean and standard deviation (float32) of each image, of
its mirror image too where a run flips, the conditions as the network takes them, and the null. Its
record carries the *key*: what the numbers depend on. A cache with another key is refused, never
used. A mirrored image is the mirror image of the same crop, so to SDXL its crop begins as far from
the left as the original's ended from the right.
n images of a shard, B batch, C channels, h x w of latents, H x W of images.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from deme_cli.artifacts import Record, fingerprint_file, write_artifact
from deme_cli.data.fitting import CENTRE, Shape, crop_corner
from deme_cli.data.images import ImageData, to_unit
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.conditions import Conditions
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.files import read_header, require_space
from deme_cli.jobs import claim

SIZES = "time_ids"  # SDXL's keyword for the sizes of an image and its crop
FOLDER = ".deme-cache"
ROWS, LEAST_ROWS = 256, 32  # images of a shard; fewer where they are large
MIRRORED = "mirrored_"
_SHARD_PIXELS = 1 << 26  # 256 images of 512 x 512, 64 of 1024 x 1024
_OPEN_SHARDS = 64  # shards mapped at a time
_PIXELS = 1 << 20  # encoded at a time: four images of 512 x 512
_LARGEST_BATCH = 32
_POLL_SECONDS = 0.2
_WORDS = {
    "data": "other images or captions",
    "num_images": "another number of images",
    "flips": "another choice of --flip",
    "rows": "shards of another size",
}


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
        companions = self.companions
        if companions.wants == "nothing":
            return {}
        of_images = self.data.captions if companions.wants == "text" else self.data.labels
        # sizes only where the network is told them, for every image's header is read for that
        has_sizes = SIZES in companions.backbone.condition_shapes(companions.record.model_config)
        sizes = self.geometry(indices, flip, crops) if has_sizes else None
        return companions.conditions(of_images(indices), sizes)

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


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Record):
    """The header of a shard: images start .. stop - 1 under `key`. Not an artifact kind."""

    kind: ClassVar[str] = "latent-cache"
    key: dict[str, Any]
    start: int
    stop: int


def cache_key(encoder: Encoder, *, split: str, crop: str, flips: bool) -> dict[str, Any]:
    """Everything that cached numbers depend on. Captions count by what they say (`data`)."""
    data, companions = encoder.data, encoder.companions
    return {
        **companions.digests,
        "pipeline": companions.backbone.pipeline,
        "data": data.fingerprint,
        "split": split,
        "num_images": len(data),
        "resolution": list(data.shape[1:]),
        "crop": crop,
        "dtype": str(companions.dtype).removeprefix("torch."),
        "flips": flips and crop == "centre",
        "rows": min(ROWS, max(LEAST_ROWS, _SHARD_PIXELS // math.prod(data.shape[1:]))),
    }


def cache_folder(setting: str, beside: Path, key: Mapping[str, Any]) -> Path:
    """The folder of a cache: `auto` names it by its key, a given one holds a folder per split."""
    if setting != "auto":
        return Path(setting).expanduser() / key["split"]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return beside / FOLDER / name


class LatentCache:
    """What `encoder` makes of images 0 .. num_needed - 1, read from the cache of `key` in `folder`.

    Centre crops come with their latents from the cache; of random crops only what is said of the
    image does, and the frozen parts are asked for the rest.
    """

    def __init__(
        self, encoder: Encoder, folder: Path, key: Mapping[str, Any], *, num_needed: int
    ) -> None:
        self.encoder, self.folder, self.key = encoder, folder, dict(key)
        self.data, self.companions = encoder.data, encoder.companions
        self.latent_shape, self.runs_vae = encoder.latent_shape, key["crop"] != "centre"
        self.holds_latents = key["crop"] == "centre"  # of random crops there would be too many
        self.num_shards = -(-num_needed // key["rows"])
        self.num_images = min(self.num_shards * key["rows"], key["num_images"])
        self.sound: set[int] = set()  # shards that this process has written, or checked
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def span(self, shard: int) -> range:
        """The images of a shard."""
        rows = self.key["rows"]
        return range(shard * rows, min((shard + 1) * rows, self.key["num_images"]))

    def has(self, shard: int) -> bool:
        """Whether a shard is there, whole, and of this cache; its bytes are read once for that.

        A file that is not whole counts as not there. Raises ArtifactError for a shard of another
        cache or with other bytes than were written.
        """
        path, span = self.path(shard), self.span(shard)
        if shard in self.sound or not path.exists():
            return shard in self.sound
        try:
            document = json.loads(read_header(path).metadata.get("deme", "{}"))
        except (ArtifactError, json.JSONDecodeError):
            return False
        self._require_key(path, document)
        written = (document.get("start"), document.get("stop"), document.get("fingerprint"))
        if written != (span.start, span.stop, fingerprint_file(path)):
            raise ArtifactError(
                f"{path}: this part of the latents' cache is corrupt; remove the file and run the "
                f"same command again to make it anew"
            )
        self.sound.add(shard)
        return True

    def _require_key(self, path: Path, document: Mapping[str, Any]) -> None:
        """Check that a shard's record is of this cache; names the first thing that differs."""
        key = document.get("key")
        if document.get("kind") != ShardRecord.kind or not isinstance(key, dict):
            raise ArtifactError(f"{path}: not a cache of latents; choose another folder: --cache")
        for name in [*self.key, *key]:
            if key.get(name) != self.key.get(name):
                theirs, ours = (  # of a digest only the beginning
                    one[:12] if isinstance(one, str) else one
                    for one in (key.get(name), self.key.get(name))
                )
                raise ArtifactError(
                    f"{self.folder}: this cache was made with {_WORDS.get(name, f'another {name}')}"
                    f" ({theirs}, not {ours}); give another folder with --cache, or remove this one"
                )

    def posterior(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior.  (B, C, h, w) float32 each"""
        if not self.holds_latents:
            return self.encoder.posterior(indices, flip, crops)
        flips = [False] * len(indices) if flip is None else flip.tolist()
        mean, deviation = (
            self._rows(indices, [MIRRORED * mirrored + name for mirrored in flips])
            for name in ("mean", "deviation")
        )
        return mean, deviation

    def conditions(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditions:
        """What the network is told of the images, of batch B."""
        conditions = {
            name.removeprefix("condition."): self._rows(indices, [name] * len(indices))
            for name in self._names("condition.")
        }
        if crops is not None and SIZES in conditions:  # the text stays, the crop is new
            sizes = self.encoder.geometry(indices, flip, crops)
            conditions[SIZES] = sizes.to(conditions[SIZES])
        return conditions

    def null(self) -> Conditions:
        """The condition of nothing said, of batch 1."""
        shard = self._shard(0)
        return {name.removeprefix("null."): shard.get_tensor(name) for name in self._names("null.")}

    def _names(self, prefix: str) -> list[str]:
        return [name for name in self._shard(0).keys() if name.startswith(prefix)]  # noqa: SIM118

    def _rows(self, indices: Sequence[int], names: Sequence[str]) -> Tensor:
        """One row of each image, from the tensor of its name."""
        rows = []
        for index, name in zip(indices, names, strict=True):
            shard, row = divmod(int(index), self.key["rows"])
            rows.append(self._shard(shard).get_slice(name)[row])
        return torch.stack(rows)

    def _open(self, shard: int) -> Any:
        assert self.has(shard), f"{self.path(shard)} is read before the cache is filled"
        return safe_open(self.path(shard), "pt")


def fill(cache: LatentCache) -> Iterator[int]:
    """Make what is missing of `cache`; yields the images of it that are there, now and then.

    Beside other processes that do the same: each shard is claimed by who makes it. One that
    somebody else has claimed is passed by and looked at again in the end; if its maker died, its
    claim is free and it is made here. Batches lie in the same places whoever makes them, so a cache
    has the same bytes however often it was broken off. Raises ArtifactError for a shard that is
    corrupt or of another cache, MissingError where the disk is too small for the rest.
    """
    missing, num_done = [], 0
    for shard in range(cache.num_shards):
        if cache.has(shard):
            num_done += len(cache.span(shard))
            yield num_done
        else:
            missing.append(shard)
    num_missing, is_measured = sum(len(cache.span(shard)) for shard in missing), False
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
                    parts: list[dict[str, Tensor]] = []
                    for part in _encode(cache, shard):
                        if not is_measured:
                            _require_space(cache.folder, part, num_missing)
                            is_measured = True
                        if parts:
                            yield num_done + sum(map(_num_rows, parts))
                        parts.append(part)
                    _write(cache, shard, parts)
            num_done += len(cache.span(shard))
            yield num_done
        if claimed_by_others == missing:
            time.sleep(_POLL_SECONDS)
        missing = claimed_by_others


def _encode(cache: LatentCache, shard: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of a shard in batches, on the CPU."""
    encoder, span, (_, height, width) = cache.encoder, cache.span(shard), cache.data.shape
    size = max(1, min(_LARGEST_BATCH, _PIXELS // (height * width)))
    for start in range(span.start, span.stop, size):
        indices = range(start, min(start + size, span.stop))
        tensors = {f"condition.{n}": c for n, c in encoder.conditions(indices).items()}
        if cache.holds_latents:
            tensors["mean"], tensors["deviation"] = encoder.posterior(indices)
        if cache.key["flips"]:
            mirrored = encoder.posterior(indices, torch.ones(len(indices), dtype=torch.bool))
            tensors[f"{MIRRORED}mean"], tensors[f"{MIRRORED}deviation"] = mirrored
        yield {name: tensor.cpu() for name, tensor in tensors.items()}


def _write(cache: LatentCache, shard: int, parts: Sequence[Mapping[str, Tensor]]) -> None:
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors |= {f"null.{name}": value.cpu() for name, value in cache.encoder.null().items()}
    span = cache.span(shard)
    record = ShardRecord(key=cache.key, start=span.start, stop=span.stop)
    write_artifact(cache.path(shard), tensors, record)
    cache.sound.add(shard)


def _num_rows(part: Mapping[str, Tensor]) -> int:
    return len(next(iter(part.values())))


def _require_space(folder: Path, part: Mapping[str, Tensor], num_missing: int) -> None:
    """Check that the disk has room for `num_missing` images as large as those of `part`."""
    num_bytes = sum(tensor.nbytes for tensor in part.values()) // _num_rows(part) * num_missing
    try:
        require_space(folder / "shard", num_bytes)
    except MissingError as error:
        raise MissingError(
            f"{folder}: no room for the cache of latents, {num_bytes / 1e6:.0f} MB; free some "
            f"space, give a folder on another disk with --cache, or --cache off"
        ) from error
