"""`deme export` writes a pipeline that plain diffusers loads, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, write_tiny_base
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from typer.testing import Result

from deme_cli.artifacts import MergedRecord, load_tensors, read_record, write_artifact
from deme_cli.diffusion import export as export_module
from deme_cli.diffusion.denoiser import build_network, load_denoiser, predict
from deme_cli.diffusion.export import compare
from deme_cli.diffusion.projection import attach_projections
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError

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
    result = deme("export", merged, "pipe")
    assert result.exit_code == 0
    assert result.stdout == "pipe\n"
    pipeline = DiffusionPipeline.from_pretrained("pipe", local_files_only=True)
    assert isinstance(pipeline, DDPMPipeline)
    denoiser = load_denoiser(merged)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 90])
    ours, theirs = predict(denoiser.network, x_t, t), predict(pipeline.unet.eval(), x_t, t)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2).images[0].size == (8, 8)


def test_the_check_is_printed_and_told(deme: Deme, merged: Path) -> None:
    result = deme("export", merged, "pipe", "--json")
    document = json.loads(result.stdout)
    assert document["paths"] == ["pipe"]
    assert 0 <= document["max_difference"] <= 1e-5
    assert document["timesteps"] == [0, 24, 49, 74, 99]
    assert document["fingerprint"] == read_record(merged).fingerprint
    assert "differs from" in result.stderr


def test_what_was_exported_can_be_split_again(deme: Deme, merged: Path) -> None:
    deme("export", merged, "pipe")
    result = deme("split", "pipe", "-o", "next", "--json", "--data", "digits")
    assert json.loads(result.stdout)["fingerprint"] == read_record(merged).fingerprint


def test_a_ddim_checkpoint_stays_one(deme: Deme, run_folder: Path) -> None:
    record = read_record(run_folder / "base.safetensors", "base")
    scheduler_config = {**record.scheduler_config, "_class_name": "DDIMScheduler"}
    weights = load_tensors(run_folder / "base.safetensors")
    write_artifact(
        Path("d.safetensors"), weights, replace(record, scheduler_config=scheduler_config)
    )
    assert deme("export", "d.safetensors", "pipe").exit_code == 0
    assert isinstance(DiffusionPipeline.from_pretrained("pipe"), DDIMPipeline)


def test_the_card_tells_method_parents_coefficients_and_search(deme: Deme, merged: Path) -> None:
    deme("export", merged, "pipe")
    card = Path("pipe/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: unknown\n")
    assert "base_model: somebody/some-ddpm" in card
    assert f"| 50:100 | 0.5 | expert | {'2' * 16} | ft_2of2.safetensors |" in card
    assert "/home/me" not in card
    assert "... 5 more in the artifact" in card
    assert "not the ensemble of its experts" in card
    assert "Unknown: the weights inherit the terms" in card


def test_the_card_tells_coefficients_by_pattern_the_method_and_the_report(
    deme: Deme, merged: Path
) -> None:
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
    write_artifact(merged, load_tensors(merged), record)
    deme("export", merged, "pipe")
    card = Path("pipe/README.md").read_text()
    assert "hold for the tensors that none of the following patterns matches" in card
    assert (
        "| tensors | 0:50 | 50:100 |\n| --- | --- | --- |\n| `mid_block.*` | 1.5 | -0.5 |" in card
    )
    assert "The method `ties` takes the place of the plain sum" in card
    assert '"data": "images"' in card
    assert "/home/me" not in card
    assert "| model | loss |\n| --- | --- |\n| base | 0.5 |\n| merged | not finite |" in card


def test_an_expert_can_be_exported_with_a_warning(deme: Deme, run_folder: Path) -> None:
    result = deme("export", "ft_2of4.safetensors", "pipe")
    assert result.exit_code == 0
    assert "is the expert of timesteps 25:50 only" in result.stderr
    card = Path("pipe/README.md").read_text()
    assert "| range of timesteps | 25:50 |" in card
    assert "expected to be worse" in card


def test_block_projections_are_refused_with_their_reason(deme: Deme, run_folder: Path) -> None:
    record = read_record(run_folder / "base.safetensors", "base")
    network = build_network(TINY_MODEL)
    network.load_state_dict(load_tensors(run_folder / "base.safetensors"))
    attach_projections(network, "block")
    write_artifact(Path("block.safetensors"), network.state_dict(), record)
    result = deme("export", "block.safetensors", "pipe")
    assert isinstance(result.exception, ArtifactError)
    assert "cannot be folded" in str(result.exception)
    assert not Path("pipe").exists()


def test_a_folder_that_is_there_is_kept_unless_forced(deme: Deme, merged: Path) -> None:
    deme("export", merged, "pipe")
    result = deme("export", "ft_1of4.safetensors", "pipe")
    assert isinstance(result.exception, ConfigError)
    assert "pipe exists; add --force" in str(result.exception)
    assert deme("export", "ft_1of4.safetensors", "pipe", "--force").exit_code == 0
    assert "ft_1of4" in Path("pipe/README.md").read_text()


def test_a_folder_that_is_no_pipeline_is_never_replaced(deme: Deme, merged: Path) -> None:
    Path("photos").mkdir()
    result = deme("export", merged, "photos", "--force")
    assert isinstance(result.exception, ConfigError)
    assert "is no diffusers pipeline and is not replaced" in str(result.exception)


def test_a_pipeline_that_differs_is_not_written(
    deme: Deme, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "LARGEST_DIFFERENCE", -1.0)
    before = sorted(Path().iterdir())
    result = deme("export", merged, "pipe")
    assert isinstance(result.exception, NumericsError)
    assert "nothing was written" in str(result.exception)
    assert sorted(Path().iterdir()) == before


def test_the_check_sees_other_weights(run_folder: Path) -> None:
    write_tiny_base(Path("other.safetensors"), seed=1)
    denoiser = load_denoiser(Path("base.safetensors"))
    assert compare(denoiser, denoiser.network).max_difference == 0
    assert compare(denoiser, load_denoiser(Path("other.safetensors")).network).max_difference > 0.01


def test_only_denoisers_can_be_exported(deme: Deme, run_folder: Path) -> None:
    assert isinstance(deme("export", "lost.safetensors", "pipe").exception, MissingError)
    Path("broken.safetensors").write_bytes(b"no")
    assert isinstance(deme("export", "broken.safetensors", "pipe").exception, ArtifactError)
    from deme_cli.artifacts import SamplesRecord

    write_artifact(Path("s.safetensors"), {"images": torch.zeros(1)}, SamplesRecord(protocol={}))
    result = deme("export", "s.safetensors", "pipe")
    assert "expected a base, expert or merged artifact, found 'samples'" in str(result.exception)
