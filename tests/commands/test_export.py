"""`deme export` writes a pipeline that plain diffusers loads, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from typer.testing import Result

from deme_cli.artifacts import (
    MergedRecord,
    SamplesRecord,
    load_tensors,
    read_record,
    write_artifact,
)
from deme_cli.diffusion import export as export_module
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.diffusion.export import compare, model_card
from deme_cli.diffusion.projection import PREFIX

Deme = Callable[..., Result]


def write_merged(path: Path, base: Path) -> MergedRecord:
    """A merged artifact of two parents, with a search record that has a long list."""
    start = read_record(base, "base")
    parents = [
        {"path": f"/home/me/ft_{i}of2.safetensors", "kind": "expert", "fingerprint": f"{i}" * 64,
         "range": [50 * (i - 1), 50 * i]}
        for i in (1, 2)
    ]  # fmt: skip
    record = MergedRecord(
        source="somebody/some-ddpm",
        model_config=start.model_config,
        scheduler_config=start.scheduler_config,
        num_train_timesteps=100,
        base=start.fingerprint,
        parents=parents,
        coefficients=[0.25, 0.5],
        method="linear",
        projection="fold",
        search={"objective": "loss", "trials": list(range(25))},
    )
    return write_artifact(path, load_tensors(base), record)


@pytest.fixture
def merged(run_folder: Path) -> Path:
    write_merged(run_folder / "merged.safetensors", run_folder / "base.safetensors")
    return run_folder / "merged.safetensors"


def test_the_pipeline_loads_in_plain_diffusers_and_gives_the_same_outputs(
    deme: Deme, merged: Path
) -> None:
    result = deme("export", merged, "pipe", "--json")
    document = json.loads(result.stdout)
    assert document["paths"] == ["pipe"]
    assert 0 <= document["max_difference"] <= 1e-5
    assert document["timesteps"] == [0, 24, 49, 74, 99]
    assert document["fingerprint"] == read_record(merged).fingerprint
    assert "differs from" in result.stderr
    pipeline = DiffusionPipeline.from_pretrained("pipe", local_files_only=True)
    assert isinstance(pipeline, DDPMPipeline)
    denoiser = load_denoiser(merged)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 90])
    ours, theirs = predict(denoiser.network, x_t, t), predict(pipeline.unet.eval(), x_t, t)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2).images[0].size == (8, 8)
    again = deme("split", "pipe", "-o", "next", "--json", "--data", "digits")
    assert json.loads(again.stdout)["fingerprint"] == document["fingerprint"]
    card = Path("pipe/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: unknown\n")
    assert "base_model: somebody/some-ddpm" in card
    assert f"| 50:100 | 0.5 | expert | {'2' * 16} | ft_2of2.safetensors |" in card
    assert "/home/me" not in card
    assert "... 5 more in the artifact" in card
    assert "not the ensemble of its experts" in card
    assert "Unknown: the weights inherit the terms" in card


def test_a_ddim_checkpoint_stays_one(deme: Deme, run_folder: Path) -> None:
    record = read_record(run_folder / "base.safetensors", "base")
    scheduler_config = {**record.scheduler_config, "_class_name": "DDIMScheduler"}
    weights = load_tensors(run_folder / "base.safetensors")
    write_artifact(
        Path("d.safetensors"), weights, replace(record, scheduler_config=scheduler_config)
    )
    assert deme("export", "d.safetensors", "pipe").exit_code == 0
    assert isinstance(DiffusionPipeline.from_pretrained("pipe"), DDIMPipeline)


def test_the_card_tells_coefficients_by_pattern_the_method_and_the_report(merged: Path) -> None:
    rows = [
        {"name": "base", "metrics": {"loss": {"value": 0.5}, "loss 0:50": {"value": 0.25}}},
        {"name": "merged", "metrics": {"loss": {"value": None}, "loss 0:50": {"value": 0.2}}},
    ]
    record = replace(
        read_record(merged),
        coefficients_for={"mid_block.*": [1.5, -0.5]},
        method="ties",
        settings={"num": 64, "data": "/home/me/images"},
        report={"rows": rows},
    )
    card = model_card([record], merged)
    assert "hold for the tensors that none of the following patterns matches" in card
    assert (
        "| tensors | 0:50 | 50:100 |\n| --- | --- | --- |\n| `mid_block.*` | 1.5 | -0.5 |" in card
    )
    assert "The method `ties` takes the place of the plain sum" in card
    assert '"data": "images"' in card
    assert "/home/me" not in card
    assert "| model | loss |\n| --- | --- |\n| base | 0.5 |\n| merged | not finite |" in card


def test_a_pipeline_that_differs_is_not_written(
    refuse: Callable, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "LARGEST_DIFFERENCE", -1.0)
    refuse(5, "nothing was written", "export", merged, "pipe")


def test_the_check_sees_other_weights(run_folder: Path) -> None:
    write_tiny_base(Path("other.safetensors"), seed=1)
    denoiser = load_denoiser(Path("base.safetensors"))
    assert compare(denoiser, denoiser.network).max_difference == 0
    assert compare(denoiser, load_denoiser(Path("other.safetensors")).network).max_difference > 0.01


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["lost.safetensors", "pipe"], 3, "lost.safetensors: no such file"),
        (["broken.safetensors", "pipe"], 4, "not a whole safetensors file"),
        (["samples.safetensors", "pipe"], 4,
         "expected an artifact of kind 'base' or 'expert' or 'merged', found 'samples'"),
        (["block.safetensors", "pipe"], 4, "cannot be folded"),
        (["base.safetensors", "there"], 2, "there exists; add --force"),
        (["base.safetensors", "there", "--force"], 2,
         "is no diffusers pipeline and is not replaced"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_told(
    refuse: Callable, run_folder: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    Path("there").mkdir()
    Path("broken.safetensors").write_bytes(b"no")
    record, weights = read_record(Path("base.safetensors")), load_tensors(Path("base.safetensors"))
    blocks = {**weights, f"{PREFIX}.mid_block.weight": torch.eye(16)}
    write_artifact(Path("block.safetensors"), blocks, record)
    images = {"images": torch.zeros(1)}
    write_artifact(Path("samples.safetensors"), images, SamplesRecord(protocol={}))
    refuse(exit_code, message, "export", *arguments)


def test_a_pipeline_that_is_there_is_replaced_when_forced(deme: Deme, run_folder: Path) -> None:
    for artifact in ("ft_1of4", "ft_2of4"):
        done = deme("export", f"{artifact}.safetensors", "pipe", "--force")
        assert done.exit_code == 0
        assert artifact in Path("pipe/README.md").read_text()
    assert "is the expert of timesteps 25:50 only" in done.stderr
    card = Path("pipe/README.md").read_text()
    assert "| range of timesteps | 25:50 |" in card
    assert "expected to be worse" in card
