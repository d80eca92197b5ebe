from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deme_cli.config import DataConfig
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.jobs import claim
from deme_cli.training import latents
from deme_cli.training.examples import LatentExamples, cache_size, fill_caches, open_examples

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
        **images: object,
    ) -> LatentExamples:  # fmt: skip
        return open_examples(
            DataConfig(source=str(captioned), **images), open_companions(base(name).record),
            split=split, flips=flips, cache=str(tmp_path / folder),
        )  # fmt: skip

    return opened


def filled(examples: LatentExamples) -> LatentExamples:
    assert list(fill_caches(examples))[-1] == cache_size(examples)
    return examples


def draw(examples: LatentExamples, seed: int | None = 0):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    flip = torch.tensor([True, False, False, True, False])
    x0, conditions = examples.draw([17, 0, 8, 3, 3], flip=flip, generator=generator)
    return {"x0": x0, **conditions}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3"])
def test_a_cache_gives_what_the_frozen_parts_give(
    cached: Callable, examples: Callable, name: str
) -> None:
    stored, direct = filled(cached(name)), examples(name)
    for seed in (0, 1, None):
        torch.testing.assert_close(draw(stored, seed), draw(direct, seed), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored.null(), direct.null(), rtol=1e-6, atol=1e-6)
    assert "pipeline" not in vars(stored.encoder.companions)


def test_what_is_cached_is_read_without_the_frozen_parts(
    cached: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = filled(cached())
    monkeypatch.setattr(Companions, "pipeline", property(lambda self: pytest.fail("loaded")))
    again = filled(cached())
    assert torch.equal(draw(again)["x0"], draw(first)["x0"])
    again.null()


def test_the_bar_counts_images_and_reaches_the_end(cached: Callable) -> None:
    examples = cached()
    assert list(fill_caches(examples)) == [3, 6, 8, 11, 14, 16, 19]
    assert list(fill_caches(examples)) == [8, 16, 19]
    held_out = cached(split="held-out")
    assert cache_size(examples, None, held_out) == 20
    assert list(fill_caches(examples, held_out)) == [8, 16, 19, 20]


def test_a_random_crop_caches_what_is_said_and_nothing_that_is_seen(
    cached: Callable, examples: Callable
) -> None:
    stored = filled(cached("sdxl", crop="random"))
    torch.testing.assert_close(
        draw(stored), draw(examples("sdxl", crop="random")), rtol=1e-6, atol=1e-6
    )
    names = set(stored.encoder._shard(0).keys())
    assert not {"mean", "mirrored_mean"} & names


def test_only_the_images_that_are_needed_are_cached(
    captioned: Path, base: Callable[..., Denoiser], tmp_path: Path
) -> None:
    examples = open_examples(
        DataConfig(source=str(captioned)), open_companions(base("sd").record), split="train",
        cache="auto", beside=tmp_path, num_needed=9,
    )  # fmt: skip
    filled(examples)
    (folder,) = (tmp_path / ".deme-cache").iterdir()
    assert list(shards(folder)) == ["00000.safetensors", "00001.safetensors"]
    assert cache_size(examples) == 16


class Killed(Exception):
    """What stands for a kill."""


@pytest.mark.parametrize("how", ["removed", "truncated", "killed"])
def test_a_broken_off_cache_is_finished_to_the_same_bytes(
    cached: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    whole = filled(cached(folder="whole"))
    wanted = shards(whole.encoder.folder)
    folder = tmp_path / "cache" / "train"
    if how == "killed":
        write, written = latents.write_artifact, []

        def write_or_die(path, tensors, record):
            if len(written) == 1:
                (path.parent / f".{path.name}.partial").write_bytes(b"half of it")
                raise Killed
            written.append(write(path, tensors, record))

        monkeypatch.setattr(latents, "write_artifact", write_or_die)
        with pytest.raises(Killed):
            filled(cached())
        monkeypatch.setattr(latents, "write_artifact", write)
        assert list(shards(folder)) == ["00000.safetensors"]
    else:
        shutil.copytree(whole.encoder.folder, folder)
        last = folder / "00002.safetensors"
        if how == "removed":
            last.unlink()
        else:
            os.truncate(last, last.stat().st_size // 2)
    made = []
    encode = Companions.encode_images
    monkeypatch.setattr(
        Companions, "encode_images", lambda self, x: made.append(len(x)) or encode(self, x)
    )
    again = filled(cached())
    assert sum(made) == 2 * {"killed": 11}.get(how, 3)  # each image and its mirror image
    assert shards(folder) == wanted
    assert torch.equal(draw(again)["x0"], draw(whole)["x0"])


def test_a_shard_with_other_bytes_is_refused_by_name(cached: Callable) -> None:
    path = filled(cached()).encoder.path(1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"00001.safetensors: .* corrupt; remove the file"):
        filled(cached())
    path.unlink()
    filled(cached())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"captions": "other"}, "other images or captions"),
        ({"resolution": 24}, "another resolution"),
        ({"crop": "random"}, "another crop"),
    ],
)
def test_a_cache_made_with_something_else_is_refused_naming_it(
    cached: Callable, change: dict, word: str
) -> None:
    filled(cached())
    with pytest.raises(ArtifactError, match=rf"made with .*({word}).*--cache"):
        filled(cached(**change))


def test_a_cache_made_with_another_vae_is_refused(
    cached: Callable, pipelines: Callable, captioned: Path, tmp_path: Path,
    base: Callable[..., Denoiser],
) -> None:  # fmt: skip
    from dataclasses import replace

    from safetensors.torch import load_file, save_file

    from deme_cli.diffusion.model_files import digests_of

    filled(cached())
    other = tmp_path / "pipeline"
    shutil.copytree(pipelines("sd"), other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, file)
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
    assert shards(tmp_path / "cache" / "train")


def test_a_stranger_s_folder_is_left_alone(cached: Callable, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "cache" / "train"
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, folder / "00000.safetensors")
    with pytest.raises(ArtifactError, match="not a cache of latents"):
        filled(cached())
    assert len(shards(folder)) == 1


def test_two_fill_one_cache_together(cached: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = shards(filled(cached(folder="whole")).encoder.folder)
    made: dict[str, list[int]] = {"one": [], "two": []}
    write = latents.write_artifact

    def note(path, tensors, record):
        made[threading.current_thread().name].append(record.start)
        return write(path, tensors, record)

    monkeypatch.setattr(latents, "write_artifact", note)
    monkeypatch.setattr(latents, "_POLL_SECONDS", 0.01)
    pair = [cached(), cached()]
    for each in pair:
        _ = each.encoder.companions.pipeline  # both have loaded: the race is for the shards
    threads = [
        threading.Thread(target=filled, args=(each,), name=name)
        for each, name in zip(pair, made, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made["one"] + made["two"]) == [0, 8, 16]
    assert shards(pair[0].encoder.folder) == wanted
    for each in pair:
        assert all(each.encoder.has(shard) for shard in range(3))


def test_a_shard_that_another_makes_is_waited_for_and_made_if_its_maker_dies(
    cached: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = cached()
    waits = []
    holder = claim(examples.encoder.path(0).with_suffix(""))
    holder.__enter__()

    def die_soon(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            holder.__exit__(None, None, None)

    monkeypatch.setattr(latents.time, "sleep", die_soon)
    progress: Iterator[int] = fill_caches(examples)
    assert next(progress) == 3
    assert list(shards(examples.encoder.folder)) == []  # shard 1 is under way, 0 is another's
    assert list(progress)[-1] == NUM_TRAIN
    assert len(waits) == 2


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    cached: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 60_000))
    with pytest.raises(MissingError, match=r"no room for the cache of latents, 0 MB.*--cache off"):
        filled(cached())
    assert shards(tmp_path / "cache" / "train") == {}
