"""A difference as a LoRA: the best of its rank, read by plain diffusers, its share told truly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import Result

from deme_cli.artifacts import ExpertRecord, load_tensors, read_record, write_artifact
from deme_cli.diffusion.lora import layers_of, low_rank_factors
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError
from deme_cli.merging.low_rank import low_rank

Deme = Callable[..., Result]
Tensors = dict[str, torch.Tensor]


def write_expert(base: Path, path: Path, *, rank: int | None = None, scale: float = 0.1) -> Tensors:
    """An expert whose layers differ from the base by factors of `rank`, or all tensors by noise."""
    record = read_record(base, "base")
    layers, generator = layers_of(record.model_config), torch.Generator().manual_seed(1)
    weights = load_tensors(base)
    for name, theta in weights.items():
        change = torch.randn(theta.shape, generator=generator)
        if rank is not None:
            flat = change.view(len(theta), -1)
            up = torch.randn(len(theta), rank, generator=generator)
            change = (up @ flat[:rank]).view_as(theta) if len(flat) >= rank else 0 * theta
            change = change if name.removesuffix(".weight") in layers else 0 * theta
        weights[name] = theta + scale * change
    fields = ("source", "model_config", "scheduler_config", "num_train_timesteps", "companions")
    expert = ExpertRecord(
        **{name: getattr(record, name) for name in fields}, range=[0, 500], base=record.fingerprint
    )
    write_artifact(path, weights, expert)
    return weights


@pytest.fixture
def sd(pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deme: Deme):
    monkeypatch.chdir(tmp_path)
    assert deme("split", pipelines("sd")).exit_code == 0
    return pipelines("sd")


def fused_by_diffusers(folder: Path, file: str) -> Tensors:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 4, 3, 3), (30, 2, 3, 3), (7, 7)])
def test_factors_are_the_first_singular_values_and_give_everything_back_at_full_rank(
    shape: tuple[int, ...],
) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    for rank in (1, 3, len(s), 100):
        pair = low_rank(change, rank=rank)
        assert len(pair.down) == min(rank, len(s))
        best = ((u[:, :rank] * s[:rank]) @ v[:rank]).view(shape)
        torch.testing.assert_close(pair.change(), best, rtol=0, atol=1e-12)
    kept = (s.square().cumsum(0) / s.square().sum()).tolist()
    for share in (0.2, 0.95, 1.0):
        rank = len(low_rank(change, explained=share).down)
        assert kept[rank - 1] >= share - 1e-12
        assert rank == 1 or kept[rank - 2] < share


def test_a_difference_of_rank_r_has_r_factors() -> None:
    up, down = (torch.randn(9, 2).double() for _ in range(2))
    change = up @ down.T
    assert len(low_rank(change, explained=1.0).down) == len(low_rank(change, rank=8).down) == 2
    torch.testing.assert_close(low_rank(change, rank=2).change(), change)


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_plain_diffusers_fuses_a_difference_of_rank_r_exactly(
    names: str, sd: Path, deme: Deme
) -> None:
    expected = write_expert(Path("base.safetensors"), Path("ft.safetensors"), rank=2)
    result = deme("export", "ft.safetensors", "a.safetensors", "--lora", 2, "--lora-format", names)
    assert result.exit_code == 0, result.exception
    fused = fused_by_diffusers(sd, "a.safetensors")
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


def test_what_a_lora_keeps_is_what_it_says_it_keeps(sd: Path, deme: Deme) -> None:
    expected = write_expert(Path("base.safetensors"), Path("ft.safetensors"))
    base = load_tensors(Path("base.safetensors"))
    difference = sum(float((expected[n] - base[n]).square().sum()) for n in base)
    layers = layers_of(read_record(Path("base.safetensors"), "base").model_config)
    for words in (("--lora", 3), ("--explained", 0.9), ("--lora", 9, "--save-dtype", "fp16"),
                  ("--lora", 10_000), ("--lora", 12, "--lora-format", "kohya"),
                  ("--explained", 0.9, "--lora-format", "kohya")):  # fmt: skip
        result = deme("export", "ft.safetensors", "b.safetensors", *words, "--force", "--json")
        told = json.loads(result.stdout)
        fused = fused_by_diffusers(sd, "b.safetensors")
        lost = sum(float((expected[n] - fused[n]).square().sum()) for n in base)
        assert told["kept"]["total"] == pytest.approx(1 - lost / difference, abs=2e-6)
        assert told["ranks"].keys() == layers.keys()
        assert {n.removesuffix(".weight") for n in told["left_out"]}.isdisjoint(layers)
        assert "tensors changed that have no factors" in result.stderr.replace("\n", " ")
        if words == ("--lora", 10_000):
            held = [n for n in base if n.removesuffix(".weight") in layers and n[-6:] == "weight"]
            for name in held:
                torch.testing.assert_close(fused[name], expected[name], rtol=0, atol=2e-6)
            assert 1 - told["left_out_share"] == pytest.approx(told["kept"]["total"], abs=1e-9)


def test_a_task_vector_gives_the_lora_of_its_expert(run_folder: Path, deme: Deme) -> None:
    deme("task-vector", "ft_2of4.safetensors")
    for name in ("ft_2of4", "tv_2of4"):
        result = deme("export", f"{name}.safetensors", f"{name}-lora.safetensors", "--lora", 4)
        assert result.exit_code == 0, result.exception
    loras = [load_tensors(Path(f"{name}_2of4-lora.safetensors")) for name in ("ft", "tv")]
    config = read_record(Path("base.safetensors"), "base").model_config
    first, second = (low_rank_factors(lora, config, "lora") for lora in loras)
    for layer, pair in first.items():
        torch.testing.assert_close(pair.change(), second[layer].change(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "kind", "word"),
    [
        ("ft_1of4.safetensors x.safetensors --lora 0", ConfigError, "rank of 1 or more"),
        ("ft_1of4.safetensors x.safetensors --explained 1.5", ConfigError, "above 0, up to 1"),
        ("ft_1of4.safetensors x.safetensors --lora 4 --explained 0.9", ConfigError, "one of"),
        ("ft_1of4.safetensors x --lora 4", ConfigError, "ends in .safetensors"),
        ("ft_1of4.safetensors ft_2of4.safetensors --lora 4", ConfigError, "--force"),
        ("ft_1of4.safetensors x.safetensors --lora 4 --pipeline p", ConfigError, "leave it out"),
        ("ft_1of4.safetensors x.safetensors --lora 4 --lora-format lycoris", ConfigError, "kohya"),
        ("ft_1of4.safetensors x --base base.safetensors", ConfigError, "--base is for a LoRA"),
        ("base.safetensors x.safetensors --lora 4", ArtifactError, "found 'base'"),
        ("ft_1of4.safetensors x.safetensors --lora 4 --base no", MissingError, "no such file"),
        ("ft_1of4.safetensors x.safetensors --lora 4 --base ft_2of4.safetensors",
         ArtifactError, "was finetuned from base"),
    ],
)  # fmt: skip
def test_what_gives_no_lora_is_refused_and_nothing_is_written(
    words: str, kind: type[DemeError], word: str, run_folder: Path, deme: Deme
) -> None:
    error = deme("export", *words.split()).exception
    assert isinstance(error, kind)
    assert word in str(error)
    assert not list(Path().glob("x*"))


def test_kohya_has_no_names_for_transformers_here(
    pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deme: Deme
) -> None:
    monkeypatch.chdir(tmp_path)
    deme("split", pipelines("dit"))
    write_expert(Path("base.safetensors"), Path("ft.safetensors"), rank=1)
    words = ("export", "ft.safetensors", "a.safetensors", "--lora", 2)
    assert "of another network" in str(deme(*words, "--lora-format", "kohya").exception)
    assert deme(*words).exit_code == 0
