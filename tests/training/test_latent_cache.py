"""The cache of latents and conditions: what it holds, how it is made, and what it refuses."""

from __future__ import annotations

import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deme_cli.config import DataConfig
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.model_files import digests_of
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.jobs import claim
from deme_cli.training import examples as latents
from deme_cli.training.examples import LatentExamples, fill_caches, open_examples

NUM_TRAIN = 19  # of twenty images the last is held out


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "ROWS", 8)
    monkeypatch.setattr(latents, "_LARGEST_BATCH", 3)


@pytest.fixture
def cached(captioned: Path, base: Callable[..., Denoiser], tmp_path: Path) -> Callable:
    """Examples with a cache in a folder of the test, with frozen parts that nobody loaded yet."""

    def opened(
        name: str = "sd", *, split: str = "train", folder: str = "cache", flips: bool = True,
        num_needed: int | None = None, **images: object,
    ) -> LatentExamples:  # fmt: skip
        return open_examples(
            DataConfig(source=str(captioned), **images), open_companions(base(name).record),
            split=split, flips=flips, cache=folder if folder == "auto" else str(tmp_path / folder),
            beside=tmp_path, num_needed=num_needed,
        )  # fmt: skip

    return opened


def filled(*examples: LatentExamples) -> LatentExamples:
    told = []
    fill_caches(*examples, progress=told.append)
    assert told[-1].done == told[-1].total
    assert [step.done for step in told] == sorted(step.done for step in told)
    return examples[0]


def draw(examples: LatentExamples, seed: int | None = 0) -> dict[str, torch.Tensor]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    flip = torch.tensor([True, False, False, True, False])
    x0, conditions = examples.draw([17, 0, 8, 3, 3], flip=flip, generator=generator)
    return {"x0": x0, **conditions}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3"])
def test_a_cache_gives_what_the_frozen_parts_give(
    cached: Callable, examples: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, direct = filled(cached(name), cached(name, split="held-out")), examples(name)
    assert "pipeline" not in vars(stored.companions), "it is let go of"
    expected = [draw(direct, seed) for seed in (0, 1, None)], direct.null()
    monkeypatch.setattr(Companions, "pipeline", property(lambda self: pytest.fail("loaded")))
    for seed, wanted in zip((0, 1, None), expected[0], strict=True):
        torch.testing.assert_close(draw(stored, seed), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored.null(), expected[1], rtol=1e-6, atol=1e-6)
    again = filled(cached(name))
    assert torch.equal(draw(again)["x0"], draw(stored)["x0"])


def test_what_is_not_needed_is_not_cached(
    cached: Callable, examples: Callable, tmp_path: Path
) -> None:
    """Neither images beyond the first so many, nor latents of random crops."""
    filled(cached(folder="auto", num_needed=9))
    (folder,) = (tmp_path / ".deme-cache").iterdir()
    assert list(shards(folder)) == ["00000.safetensors", "00001.safetensors"]
    stored = filled(cached("sdxl", crop="random"))
    expected = draw(examples("sdxl", crop="random"))
    torch.testing.assert_close(draw(stored), expected, rtol=1e-6, atol=1e-6)
    assert not {"mean", "mirrored_mean"} & set(stored.cache.open(0).keys())


class Killed(Exception):
    """What stands for a kill."""


@pytest.mark.parametrize("how", ["truncated", "killed"])
def test_a_broken_off_cache_is_finished_to_the_same_bytes(
    cached: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    whole = filled(cached(folder="whole"))
    wanted, folder = shards(whole.cache.folder), tmp_path / "cache" / "train"
    if how == "killed":
        write, written = latents.write_artifact, []

        def write_or_die(path, tensors, record):
            if written:
                (path.parent / f".{path.name}.partial").write_bytes(b"half of it")
                raise Killed
            written.append(write(path, tensors, record))

        with monkeypatch.context() as patch:
            patch.setattr(latents, "write_artifact", write_or_die)
            with pytest.raises(Killed):
                filled(cached())
        assert list(shards(folder)) == ["00000.safetensors"]
    else:
        shutil.copytree(whole.cache.folder, folder)
        last = folder / "00002.safetensors"
        os.truncate(last, last.stat().st_size // 2)
    made, encode = [], Companions.encode_images
    monkeypatch.setattr(
        Companions, "encode_images", lambda self, x: made.append(len(x)) or encode(self, x)
    )
    again = filled(cached())
    assert sum(made) == 2 * {"killed": 11, "truncated": 3}[how]  # each image and its mirror image
    assert shards(folder) == wanted
    assert torch.equal(draw(again)["x0"], draw(whole)["x0"])


def test_other_bytes_another_cache_and_a_stranger_s_folder_are_refused(
    cached: Callable, tmp_path: Path
) -> None:
    path = filled(cached()).cache.path(1)
    for change, word in [
        ({"captions": "other"}, "other images or captions"),
        ({"resolution": 24}, "another resolution"),
        ({"crop": "random"}, "another crop"),
    ]:
        with pytest.raises(ArtifactError, match=rf"made with .*({word}).*--cache"):
            filled(cached(**change))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"00001.safetensors: .* corrupt; remove the file"):
        filled(cached())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="not a cache of latents"):
        filled(cached())
    path.unlink()
    filled(cached())


def test_a_cache_made_with_another_vae_is_refused(
    cached: Callable, pipelines: Callable, captioned: Path, tmp_path: Path,
    base: Callable[..., Denoiser],
) -> None:  # fmt: skip
    filled(cached())
    other = tmp_path / "pipeline"
    shutil.copytree(pipelines("sd"), other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file)
    images, record = DataConfig(source=str(captioned)), base("sd").record

    def opened(record):
        return open_examples(
            images, open_companions(record, pipeline=str(other)), split="train", flips=True,
            cache=str(tmp_path / "cache"),
        )  # fmt: skip

    with pytest.raises(ArtifactError, match=r"another vae .*give another folder with --cache"):
        filled(opened(replace(record, companions=digests_of(other))))
    with pytest.raises(ArtifactError, match="not the vae that the base was imported with"):
        opened(record)  # a whole cache does not hide another VAE's scales


def test_two_fill_one_cache_together(cached: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = shards(filled(cached(folder="whole")).cache.folder)
    made: list[int] = []
    write = latents.write_artifact
    monkeypatch.setattr(
        latents, "write_artifact", lambda p, t, r: made.append(r.start) or write(p, t, r)
    )
    monkeypatch.setattr(latents, "_POLL_SECONDS", 0.01)
    pair = [cached(), cached()]
    for each in pair:
        _ = each.companions.pipeline  # both have loaded: the race is for the shards
    threads = [threading.Thread(target=fill_caches, args=(each,)) for each in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == [0, 8, 16]
    for each in pair:
        assert shards(each.cache.folder) == wanted
        assert all(each.cache.has(shard) for shard in range(3))


def test_a_shard_that_another_makes_is_waited_for_and_made_if_its_maker_dies(
    cached: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, waits = cached(), []
    holder = claim(examples.cache.path(0).with_suffix(""))
    holder.__enter__()

    def die_soon(seconds: float) -> None:
        assert list(shards(examples.cache.folder)) == ["00001.safetensors", "00002.safetensors"]
        waits.append(seconds)
        if len(waits) == 2:
            holder.__exit__(None, None, None)

    monkeypatch.setattr(latents.time, "sleep", die_soon)
    filled(examples)
    assert len(waits) == 2


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    cached: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 60_000))
    with pytest.raises(MissingError, match=r"cache/train/latents: needs .*free some space"):
        filled(cached())
    assert shards(tmp_path / "cache" / "train") == {}
