"""Latents and conditions on disk, so that the frozen parts run once and not in every update.

A cache is a folder of shards, safetensors files of some hundred images each, written whole and read
row by row. A shard holds the VAE posterior's mean and standard deviation (float32) of each image,
of its mirror image too where a run flips, the conditions as the network takes them, and the null.
Its record carries the *key*: what the numbers depend on. A cache with another key is refused, never
used. Filling is in cache_filling.py.
n images of a shard, B batch, C channels, h x w of latents.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from deme_cli.artifacts import Record, fingerprint_file
from deme_cli.diffusion.conditions import Conditions
from deme_cli.errors import ArtifactError
from deme_cli.files import read_header
from deme_cli.training.encoder import SIZES, Encoder

ROWS, LEAST_ROWS = 256, 32  # images of a shard; fewer where they are large
_SHARD_PIXELS = 1 << 26  # 256 images of 512 x 512, 64 of 1024 x 1024
FOLDER = ".deme-cache"
MIRRORED = "mirrored_"
_OPEN_SHARDS = 64  # shards mapped at a time
_WORDS = {
    "data": "other images or captions",
    "num_images": "another number of images",
    "flips": "another choice of --flip",
    "rows": "shards of another size",
}


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


def cache_place(setting: str, beside: Path, key: Mapping[str, Any]) -> Path:
    """The folder of a cache: `auto` names it by its key, a given one holds a folder per split."""
    if setting != "auto":
        return Path(setting).expanduser() / key["split"]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return beside / FOLDER / name


class LatentCache:
    """The cache of `key` in `folder`, as far as it is needed: of images 0 .. num_needed - 1."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, num_needed: int) -> None:
        self.folder, self.key, self.num_needed = folder, dict(key), num_needed
        self._sound: set[int] = set()
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._open)

    @property
    def holds_latents(self) -> bool:
        """Whether latents are kept: of random crops there would be too many."""
        return self.key["crop"] == "centre"

    @property
    def num_shards(self) -> int:
        return -(-self.num_needed // self.key["rows"])

    @property
    def num_images(self) -> int:
        """Images of the shards that are needed."""
        return min(self.num_shards * self.key["rows"], self.key["num_images"])

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
        path = self.path(shard)
        if shard in self._sound:
            return True
        if not path.exists():
            return False
        try:
            document = json.loads(read_header(path).metadata.get("deme", "{}"))
        except (ArtifactError, json.JSONDecodeError):
            return False
        self._require_key(path, document)
        span = self.span(shard)
        found = (document.get("start"), document.get("stop"), document.get("fingerprint"))
        if found != (span.start, span.stop, fingerprint_file(path)):
            raise ArtifactError(
                f"{path}: this part of the latents' cache is corrupt; remove the file and run the "
                f"same command again to make it anew"
            )
        self._sound.add(shard)
        return True

    def note_made(self, shard: int) -> None:
        """Take a shard that this process has just written for sound."""
        self._sound.add(shard)

    def _require_key(self, path: Path, document: Mapping[str, Any]) -> None:
        """Check that a shard's record is of this cache; names the first thing that differs."""
        found = document.get("key")
        if document.get("kind") != ShardRecord.kind or not isinstance(found, dict):
            raise ArtifactError(f"{path}: not a cache of latents; choose another folder: --cache")
        for name in [*self.key, *found]:
            if found.get(name) != self.key.get(name):
                what = _WORDS.get(name, f"another {name}")
                raise ArtifactError(
                    f"{self.folder}: this cache was made with {what} ({_short(found.get(name))}, "
                    f"not {_short(self.key.get(name))}); give another folder with --cache, or "
                    f"remove this one"
                )

    def posterior(self, indices: Sequence[int], flip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior.  (B, C, h, w) float32 each"""
        flips = [False] * len(indices) if flip is None else flip.tolist()
        names = [MIRRORED if mirrored else "" for mirrored in flips]
        return self._rows(indices, [n + "mean" for n in names]), self._rows(
            indices, [n + "deviation" for n in names]
        )

    def conditions(self, indices: Sequence[int]) -> Conditions:
        """What the network is told of the images, of batch B."""
        return {
            name.removeprefix("condition."): self._rows(indices, [name] * len(indices))
            for name in self._names("condition.")
        }

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


class CachedEncoder:
    """An encoder that reads what its cache holds, and asks the frozen parts for the rest.

    Centre crops come with their latents from the cache; of random crops only what is said of the
    image does.
    """

    def __init__(self, encoder: Encoder, cache: LatentCache) -> None:
        self.encoder, self.cache = encoder, cache
        self.data, self.companions = encoder.data, encoder.companions
        self.latent_shape = encoder.latent_shape

    @property
    def runs_vae(self) -> bool:
        return not self.cache.holds_latents

    def posterior(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.cache.holds_latents:
            return self.cache.posterior(indices, flip)
        return self.encoder.posterior(indices, flip, crops)

    def conditions(
        self, indices: Sequence[int], flip: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditions:
        conditions = self.cache.conditions(indices)
        if crops is not None and SIZES in conditions:  # the text stays, the crop is new
            sizes = self.encoder.geometry(indices, flip, crops)
            conditions[SIZES] = sizes.to(conditions[SIZES])
        return conditions

    def null(self) -> Conditions:
        return self.cache.null()


def _short(value: Any) -> str:
    """A value of a key; of a digest only the beginning."""
    return str(value)[:12] if isinstance(value, str) else str(value)
