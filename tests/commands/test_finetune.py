from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER, write_tiny_base
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from deme_cli.artifacts import read_record
from deme_cli.config import DataConfig, FinetuneConfig, SplitConfig
from deme_cli.diffusion.companions import Companions
from deme_cli.timesteps import split_uniform
from deme_cli.training.clusters import Affinity
from deme_cli.training.setup import Plan, plan_experts, prepare

QUICK = ["--data", "digits", "--steps", 3, "--batch-size", 4, "--device", "cpu", "--held-out", 0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny_base(tmp_path / "base.safetensors")
    return tmp_path


HALF = ["--range", "1/2", "--p", 0, "--clusters", 2]
UW = ["--multitask", "uw"]
BY_GRADIENT = [*UW, "--cluster-by", "gradient"]


def test_a_range_becomes_an_expert_and_its_path_is_the_result(deme, folder: Path) -> None:
    done = deme("finetune", "--range", "2/4", "--p", 0.1, *QUICK)
    assert done.exit_code == 0, done.exception
    assert done.stdout == "ft_2of4.safetensors\n"
    record = read_record(folder / "ft_2of4.safetensors", "expert")
    assert (record.p, record.range, record.steps) == (0.1, [25, 50], 3)
    done = deme("finetune", "--range", "10:30", "--json", *QUICK)
    assert json.loads(done.stdout) == {"schema_version": 1, "paths": ["ft_10-30.safetensors"]}
    assert read_record(folder / "ft_10-30.safetensors", "expert").index is None


def test_all_ranges_follow_the_split_and_finished_ones_are_kept_where_nothing_changed(
    deme, refuse, folder: Path, image_folder: Path
) -> None:
    (folder / "deme.toml").write_text('[split]\nn = 2\nranges = ["0:20", "20:100"]\n')
    words = ["finetune", *QUICK, "--data", image_folder, "--range"]
    assert deme(*words, "1/2").exit_code == 0
    before = (folder / "ft_1of2.safetensors").stat().st_mtime_ns
    done = deme(*words, "all")
    assert done.stdout.split() == ["ft_1of2.safetensors", "ft_2of2.safetensors"]
    assert (folder / "ft_1of2.safetensors").stat().st_mtime_ns == before
    assert read_record(folder / "ft_2of2.safetensors").range == [20, 100]
    refuse(2, "another lr", "finetune", *QUICK, *words[1:], "all", "--lr", 1e-3)
    Image.new("L", (8, 8), 9).save(image_folder / "03.png")
    refuse(2, "trained on other images or captions", "finetune", *QUICK, *words[1:], "all")


@pytest.mark.slow
def test_ranges_side_by_side_equal_ranges_one_after_another(deme, folder: Path) -> None:
    """Every setting reaches a range that runs in a process of its own."""
    (folder / "deme.toml").write_text("[split]\nn = 2\n[finetune]\nmultitask_lr = 0.5\n")
    words = [*QUICK, "--p", 0, "--multitask", "uw", "--clusters", 2, "--no-flip"]
    done = deme("finetune", "--range", "all", "--jobs", 2, *words)
    assert done.exit_code == 0, done.exception
    path = folder / "ft_2of2.safetensors"
    together = read_record(path)
    deme("finetune", "--range", "2/2", "--force", *words)
    assert read_record(path) == together


def test_a_lack_of_memory_is_told_with_what_is_done_about_it(
    deme, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = UNet2DModel.forward

    def with_little_memory(self: UNet2DModel, x_t: Tensor, *args: object, **kwargs: object) -> Any:
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x_t, *args, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", with_little_memory)
    held_out = ["--held-out", 5, "--checkpoint-every", 2]  # in parts that fit, too
    done = deme("finetune", "--range", "1/2", *QUICK, *held_out)
    assert done.exit_code == 0, done.exception
    assert "out of memory: 2 images at a time from here on" in done.stderr
    assert done.stderr.count("--micro-batch 2") == 1
    curve = (folder / "ft_1of2.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["halved_to"] for line in curve] == [2, None]


def test_it_tells_its_size_and_reports_by_batches_not_by_updates(deme, folder: Path) -> None:
    done = deme("finetune", "--range", "1/2", *QUICK, "--accumulation", 5)
    assert "ft_1of2.safetensors: timesteps 0:50, 3 updates, 60 images of 8 x 8" in done.stderr
    curve = (folder / "ft_1of2.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve] == [2, 3]


def test_a_dry_run_says_what_would_run_and_changes_nothing(deme, folder: Path) -> None:
    kept = folder / ".ft_1of4.checkpoint"
    kept.write_bytes(b"kept")
    done = deme("finetune", "--range", "all", "--force", "--dry-run", *QUICK)
    assert "ft_4of4.safetensors: timesteps 75:100, 3 updates, 12 images" in done.stderr
    assert done.stdout == ""
    assert {path.name for path in folder.iterdir()} == {"base.safetensors", kept.name}
    assert kept.read_bytes() == b"kept"
    assert deme("finetune", "--range", "1/4", "--force", *QUICK).exit_code == 0
    assert not kept.exists()


EMAS = ["--ema-lengths", "0.05,0.1", "--snapshot-every", 2]


def test_averages_and_snapshots_are_results_and_their_places_are_checked(
    deme, refuse, folder: Path
) -> None:
    (folder / "deme.toml").write_text("[split]\nn = 1\n")
    averages = ("ema-0.050", "ema-0.100")
    words = ("step-000002", *(f"step-000002.{average}" for average in averages), *averages)
    names = ["ft_1of1.safetensors", *(f"ft_1of1.snapshots/{word}.safetensors" for word in words)]
    dry = deme("finetune", "--range", "1/1", "--dry-run", *QUICK, *EMAS)
    assert "3 updates, 12 images, 5 more files" in dry.stderr
    (folder / names[3]).parent.mkdir()
    (folder / names[3]).write_bytes(b"mine")
    refuse(2, f"{names[3]} exists; add --force", "finetune", "--range", "1/1", *QUICK, *EMAS)
    done = deme("finetune", "--range", "1/1", "--json", "--force", *QUICK, *EMAS)
    assert json.loads(done.stdout)["paths"] == names
    assert all(read_record(folder / name, "expert").of == 1 for name in names)
    (folder / names[1]).unlink()  # no longer wanted
    done = deme("finetune", "--range", "all", *QUICK, *EMAS)
    assert done.stdout.split() == [name for name in names if name != names[1]]
    other = deme("finetune", "--range", "all", *QUICK)
    assert "exists with another ema_lengths, [0.05, 0.1] and not None" in str(other.exception)
    (folder / names[0]).unlink()
    words = ["finetune", "--range", "1/1", "--dry-run", *QUICK, *EMAS]
    assert "exists" in str(deme(*words).exception)
    (folder / ".ft_1of1.checkpoint").write_bytes(b"kept")  # a kept run goes on beside its own
    assert deme(*words).exit_code == 0


def test_a_disk_without_room_for_the_snapshots_is_refused_up_front(
    deme, refuse, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "base.safetensors").stat().st_size
    usage = shutil.disk_usage(folder)._replace(free=10 * size)  # of 12 with averages, 5 without
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ["finetune", "--range", "1/2", "--dry-run", *QUICK]
    refuse(3, "free some space", *words, *EMAS)
    assert deme(*words).exit_code == 0


def test_a_base_of_ones_own_is_trained_from_a_description(deme, folder: Path) -> None:
    document = {"model": TINY_MODEL, "scheduler": TINY_SCHEDULER}
    (folder / "tiny.json").write_text(json.dumps(document))
    done = deme("finetune", "--from-scratch", "tiny.json", "-o", "own.safetensors", *QUICK)
    assert done.exit_code == 0, done.exception
    record = read_record(folder / "own.safetensors", "base")
    assert record.num_train_timesteps == 100
    assert record.training["steps"] == 3
    again = deme("finetune", "--range", "1/2", "--base", "own.safetensors", *QUICK)
    assert again.exit_code == 0, again.exception


REFUSED = [
    ([], 2, "either --range"),
    (["--range", "1/2", "--resume"], 3, "no unfinished run"),
    (["--range", "1/2", "--resume", "--force"], 2, "give one of them"),
    (["--range", "1/2", "--shard"], 2, "this is one alone"),
    (["--range", "all", "-o", "x.safetensors"], 2, "--range all writes one for each"),
    (["--range", "1/2", "--base", "none.safetensors"], 3, "no base there"),
    (["--range", "1/2", "--data", ""], 2, "no training images"),
    (["--range", "1/2", "--data", "nowhere"], 3, "nowhere"),
    (["--from-scratch", "none.toml"], 3, "none.toml: no such file"),
    (["--from-scratch", "half.toml"], 2, "lacks the table [scheduler]"),
    (["--from-scratch", "bad.toml"], 2, "neither valid TOML nor JSON"),
    (["--from-scratch", "slip.json"], 2, "did you mean 'layers_per_block'"),
    ([*HALF, "--ema-lengths", "0.05,long"], 2, "separated by commas"),
    ([*HALF, "--ema-lengths", "0.3"], 2, "above 0, below 0.2886"),
    ([*HALF, "--ema-lengths", "0.05,0.05"], 2, "different numbers"),
    ([*HALF, "--snapshot-every", 3], 2, "less than steps = 3"),
    ([*HALF, "--loss-weighting", "max-snr"], 2, "'max-snr': expected one of none, unif"),
    ([*HALF, "--multitask", "gradnorm"], 2, "'gradnorm': expected one of none, uw, nashmtl"),
    ([*HALF, "--weighting-gamma", 2], 2, "not to loss_weighting = 'none'"),
    ([*HALF, "--loss-weighting", "p2", "--weighting-k", -1], 2, "weighting_k = -1.0: expected"),
    ([*HALF, "--normalise-weighting"], 2, "normalise_weighting belongs to"),
    ([*HALF, *UW, "--clusters", 5], 2, "from 2 to batch_size = 4"),
    ([*HALF, *UW, "--antithetic"], 2, "whole batches; leave"),
    ([*HALF, *UW, "--loss-weighting", "uncertainty"], 2, "both learn weights"),
    ([*HALF, *UW, "--micro-batch", 4], 2, "balances the losses of whole batches"),
    ([*HALF, *UW, "--p", 0.3], 2, "p = 0.3 draws outside them; use --p 0 or --range 1/1"),
    ([*HALF, *UW, "--range", "0:99", "--p", 0.3], 2, "divides range 0:99 into clusters"),
    ([*HALF, *UW, "--range", "3:6", "--clusters", 4], 2, "4 clusters of the 3 timesteps"),
    ([*HALF, *BY_GRADIENT, "--dry-run"], 3, "deme analyze gradients"),
    (["--from-scratch", "tiny.json", "--clusters", 2, *BY_GRADIENT], 2, "a base from scratch"),
]


def test_wrong_input_is_one_clear_line_and_writes_nothing(deme, refuse, folder: Path) -> None:
    (folder / "half.toml").write_text("[model]\nsample_size = 8\n")
    (folder / "bad.toml").write_text("[model")
    tiny = {"model": TINY_MODEL, "scheduler": TINY_SCHEDULER}
    (folder / "tiny.json").write_text(json.dumps(tiny))
    slip = {"model": {**TINY_MODEL, "layers_per_blok": 2}, "scheduler": TINY_SCHEDULER}
    (folder / "slip.json").write_text(json.dumps(slip))
    for options, exit_code, word in REFUSED:
        own = ["-o", "own.safetensors"] if "--from-scratch" in options else []
        refuse(exit_code, word, "finetune", *QUICK, *own, *options)


LATENT = [
    "--data", "images", "--steps", 2, "--batch-size", 2, "--accumulation", 1, "--device", "cpu",
    "--held-out", 1,
]  # fmt: skip


@pytest.fixture
def latent_folder(
    pipelines: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deme: Callable
) -> Path:
    """A split tiny Stable Diffusion, and eight captioned images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for index in range(8):
        pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        text = f"thing {index}" * (40 if index == 3 else 1)
        rows.append({"file_name": f"{index}.png", "text": text, "alt": f"no {index}"})
    metadata = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "images" / "metadata.jsonl").write_text(metadata)
    shutil.copytree(pipelines("sd"), tmp_path / "sd")
    done = deme("split", "sd", "-n", 2, "--data", "images")
    assert done.exit_code == 0, done.exception
    return tmp_path


def test_a_latent_model_is_finetuned_and_its_latents_are_cached_once(
    deme, latent_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = deme("finetune", "--range", "1/2", *LATENT)
    assert done.exit_code == 0, done.exception
    assert "caching latents: 8/8" in done.stderr
    cut = "images: train captions: 1 of 7 are too long and lose their end, 1 in text_encoder (CLIP)"
    assert f"{cut}, which takes 77 tokens; the first is number 4: thing 3thing" in done.stderr
    caches = sorted((latent_folder / ".deme-cache").iterdir())
    assert len(caches) == 2  # train and held-out
    before = [path.stat().st_mtime_ns for cache in caches for path in cache.iterdir()]
    other = deme("finetune", "--range", "2/2", "--caption-dropout", 0.3, *LATENT)
    assert other.exit_code == 0, other.exception
    assert [path.stat().st_mtime_ns for cache in caches for path in cache.iterdir()] == before
    record = read_record(latent_folder / "ft_2of2.safetensors", "expert")
    base = read_record(latent_folder / "base.safetensors", "base")
    assert record.companions == base.companions
    assert record.training["caption_dropout"] == 0.3
    assert (record.training["resolution"], record.training["crop"]) == ([16, 16], "centre")
    # and a search of coefficients reads the held-out ones
    monkeypatch.setattr(Companions, "pipeline", property(lambda self: pytest.fail("loaded")))
    words = ["--search", "grid", "--num", 4, "--grid", "0,1", "--device", "cpu", "--no-report"]
    merged = deme("merge", "ft_1of2.safetensors", "ft_2of2.safetensors", *words, "--json")
    assert merged.exit_code == 0, merged.exception
    assert json.loads(merged.stdout)["search"]["objective"] == "loss"


def test_a_crop_a_resolution_and_another_place_of_the_parts_are_options(
    deme, refuse, latent_folder: Path
) -> None:
    (latent_folder / "sd").rename(latent_folder / "elsewhere")
    refuse(3, "--pipeline", "finetune", "--range", "1/2", *LATENT)
    done = deme(
        "finetune", "--range", "1/2", "--pipeline", "elsewhere", "--crop", "random",
        "--resolution", 24, "--flip", *LATENT,
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    record = read_record(latent_folder / "ft_1of2.safetensors", "expert")
    assert (record.training["resolution"], record.training["crop"]) == ([24, 24], "random")
    words = ("--range", "all", "--pipeline", "elsewhere")
    refuse(2, "exists with another crop", "finetune", *words, *LATENT)


LATENT_REFUSED = [
    (["--captions", "words"], 4, "no column words"),
    (["--resolution", 17], 2, "resolution = 17"),
    (["--crop", "left"], 2, "centre, random"),
    (["--pipeline", "nowhere"], 3, "nowhere"),
    (["--pipeline", "images"], 3, "--pipeline"),
    (["--pipeline", "part"], 3, "the vae is missing"),
]


def test_wrong_input_for_a_latent_model_is_one_clear_line_in_a_dry_run(
    deme, refuse, latent_folder: Path
) -> None:
    shutil.copytree(latent_folder / "sd", latent_folder / "part")
    shutil.rmtree(latent_folder / "part" / "vae")
    for options, exit_code, word in LATENT_REFUSED:
        refuse(exit_code, word, "finetune", "--range", "1/2", "--dry-run", *LATENT, *options)


def write_gradients(path: Path, fingerprint: str) -> None:
    """`gradients.json` of ten buckets, of which the first seven are alike and so are the rest."""
    alike = [[1.0 if (i < 7) == (j < 7) else -1.0 for j in range(10)] for i in range(10)]
    affinity = Affinity(
        buckets=split_uniform(10, 100), cosines=alike, norms=[1.0] * 10, losses=[1.0] * 10,
        reliability=[1.0] * 10, model={"source": "tiny", "fingerprint": fingerprint},
        data={"source": "digits", "fingerprint": ""}, num=2, seed=0, parameters=1, sketch_size=1,
        standard_error=0.0, ranges=split_uniform(1, 100),
    )  # fmt: skip
    path.write_text(affinity.to_json())


def test_clusters_by_gradient_need_the_gradients_of_this_base(deme, refuse, folder: Path) -> None:
    path, base = folder / "gradients.json", read_record(folder / "base.safetensors")
    write_gradients(path, "0" * 64)
    refuse(4, "measured on another model", "finetune", *QUICK, *HALF, *BY_GRADIENT, "--dry-run")
    write_gradients(path, base.fingerprint)
    done = deme("finetune", *QUICK, *HALF, *BY_GRADIENT)
    assert done.exit_code == 0, done.exception
    settings = FinetuneConfig(p=0.0, clusters=2, multitask="uw", cluster_by="gradient", held_out=0)
    asked = Plan(Path("base.safetensors"), DataConfig(source="digits"), settings, device="cpu")
    for text, clusters in {"1/1": ["0:70", "70:100"], "65:80": ["65:70", "70:80"]}.items():
        (plan,) = plan_experts(asked, SplitConfig(), text, None)
        assert [str(cluster) for cluster in prepare(plan).clusters] == clusters
    path.unlink()  # only clusters by gradient go by them
    done = deme("finetune", *QUICK, *HALF, "--multitask", "uw", "--cluster-by", "snr", "--force")
    assert done.exit_code == 0, done.exception


def test_the_record_of_an_expert_tells_how_timesteps_were_weighed(
    deme, refuse, folder: Path
) -> None:
    (folder / "deme.toml").write_text("[split]\nn = 1\n")
    words = ["--loss-weighting", "min-snr", "--weighting-gamma", 3, "--multitask", "nashmtl"]
    words = [*HALF, "--range", "all", *words, "--multitask-every", 2, "--cluster-by", "log-snr"]
    done = deme("finetune", *QUICK, *words)
    assert done.exit_code == 0, done.exception
    training = read_record(folder / "ft_1of1.safetensors", "expert").training
    told = ["loss_weighting", "weighting_gamma", "multitask", "clusters", "cluster_by"]
    assert [training.get(key) for key in told] == ["min-snr", 3.0, "nashmtl", 2, "log-snr"]
    assert training["multitask_every"] == 2
    # and is not taken for one that would be weighed otherwise
    refuse(
        2,
        "another weighting_gamma, 3.0 and not 4.0",
        "finetune",
        *QUICK,
        *words,
        "--weighting-gamma",
        4,
    )
