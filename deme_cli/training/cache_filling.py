"""Make the shards of a cache that are not there yet, beside other processes that do the same.

Each shard is claimed by who makes it. One that somebody else has claimed is passed by and looked at
again in the end; if its maker died, its claim is free and it is made here. Batches lie in the same
places whoever makes them, so a cache has the same bytes however often it was broken off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from deme_cli.artifacts import write_artifact
from deme_cli.errors import ConfigError, MissingError
from deme_cli.files import require_space
from deme_cli.jobs import claim
from deme_cli.training.encoder import Encoder
from deme_cli.training.latent_cache import MIRRORED, LatentCache, ShardRecord

_PIXELS = 1 << 20  # encoded at a time: four images of 512 x 512
_LARGEST_BATCH = 32
_POLL_SECONDS = 0.2

Tensors = dict[str, Tensor]


def fill(cache: LatentCache, encoder: Encoder) -> Iterator[int]:
    """Make what is missing of `cache`; yields the images of it that are there, now and then.

    Raises ArtifactError for a shard that is corrupt or of another cache, MissingError where the
    disk is too small for the rest.
    """
    missing = []
    num_done = 0
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
                if not _claim(cache.path(shard), stack):
                    claimed_by_others.append(shard)
                    continue
                if not cache.has(shard):
                    tensors: list[Tensors] = []
                    for part in _encode(encoder, cache, shard):
                        if not is_measured:
                            _require_space(cache.folder, part, num_missing)
                            is_measured = True
                        if tensors:
                            yield num_done + sum(map(_num_rows, tensors))
                        tensors.append(part)
                    _write(cache, shard, tensors, encoder)
            num_done += len(cache.span(shard))
            yield num_done
        if claimed_by_others == missing:
            time.sleep(_POLL_SECONDS)
        missing = claimed_by_others


def _claim(path: Path, stack: ExitStack) -> bool:
    """Claim the making of a shard until `stack` closes; False while another process holds it."""
    try:
        stack.enter_context(claim(path.with_suffix("")))
    except ConfigError:
        return False
    return True


def _encode(encoder: Encoder, cache: LatentCache, shard: int) -> Iterator[Tensors]:
    """The tensors of a shard in batches, on the CPU."""
    span, (_, height, width) = cache.span(shard), encoder.data.shape
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


def _write(cache: LatentCache, shard: int, parts: list[Tensors], encoder: Encoder) -> None:
    """Write a shard from its batches."""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors |= {f"null.{name}": value.cpu() for name, value in encoder.null().items()}
    span = cache.span(shard)
    record = ShardRecord(key=cache.key, start=span.start, stop=span.stop)
    write_artifact(cache.path(shard), tensors, record)
    cache.note_made(shard)


def _num_rows(part: Tensors) -> int:
    return len(next(iter(part.values())))


def _require_space(folder: Path, part: Tensors, num_missing: int) -> None:
    """Check that the disk has room for `num_missing` images as large as those of `part`."""
    num_bytes = sum(tensor.nbytes for tensor in part.values()) // _num_rows(part) * num_missing
    try:
        require_space(folder / "shard", num_bytes)
    except MissingError as error:
        raise MissingError(
            f"{folder}: no room for the cache of latents, {num_bytes / 1e6:.0f} MB; free some "
            f"space, give a folder on another disk with --cache, or --cache off"
        ) from error
