from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from PIL import Image
from stand_ins import save_script

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.checkpoints import base_record, import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.diffusion.projection import PREFIX
from deme_cli.errors import Stopped
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance
from deme_cli.merging.candidates import CandidateNetwork
from deme_cli.merging.combine import merge_artifacts
from deme_cli.merging.lineage import Family, open_family, open_parents
from deme_cli.merging.objectives import HeldOutLoss, Objective, open_objective
from deme_cli.sampling.sampler import collect_images, image_seed, single
from deme_cli.training.examples import PixelExamples
from deme_cli.training.materials import fill_caches

SAMPLE = SampleConfig(num=24, steps=3, seed=5, batch_size=16)


def go_on() -> None:
    """A check that never stops."""


@pytest.fixture
def denoiser(tmp_path: Path) -> Denoiser:
    write_tiny_base(tmp_path / "base.safetensors")
    return load_denoiser(tmp_path / "base.safetensors")


@pytest.fixture
def family(tmp_path: Path, denoiser: Denoiser) -> Family:
    base = tmp_path / "base.safetensors"
    experts = [tmp_path / f"ft_{index}of2.safetensors" for index in (1, 2)]
    for index, path in enumerate(experts, start=1):
        write_tiny_expert(path, base, index=index, of=2)
    return open_family(base, open_parents(experts, "expert"))


def held_out_loss(denoiser: Denoiser, **settings: int) -> HeldOutLoss:
    data = open_images("digits", shape=(1, 8, 8), split="held-out")
    return HeldOutLoss(PixelExamples(data), denoiser.schedule, MergeConfig(**settings))


def open_distance(denoiser: Denoiser) -> Objective:
    return open_objective(
        MergeConfig(objective="fid"), denoiser.record, images=DataConfig(source="digits"),
        sample=SAMPLE, features="digits", resize="clean", device="cpu",
    )  # fmt: skip


def test_the_loss_is_the_mean_over_its_draws_one_by_one(denoiser: Denoiser) -> None:
    objective = held_out_loss(denoiser, num=12, batch_size=5, seed=3)
    data = open_images("digits", shape=(1, 8, 8), split="held-out")
    errors = []
    for index, (image, t) in enumerate(
        zip(objective.draws.images.tolist(), objective.draws.t.tolist(), strict=True)
    ):
        x0 = to_unit(data.batch([image]))
        generator = torch.Generator().manual_seed(image_seed(3, index))
        eps = torch.randn(1, 1, 8, 8, generator=generator)
        abar = denoiser.schedule.alphas_cumprod[t]
        x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float()
        errors.append((eps - predict(denoiser.network, x_t, torch.tensor([t]))).square().mean())
    expected = torch.stack(errors).double().mean().item()
    assert objective(denoiser, go_on) == pytest.approx(expected, rel=1e-5)


def test_the_draws_use_every_image_and_every_part_of_the_horizon_evenly(denoiser: Denoiser) -> None:
    objective = held_out_loss(denoiser, num=500)
    strata = torch.bincount(objective.draws.t // 20, minlength=5)
    assert strata.tolist() == [100] * 5
    uses = torch.bincount(objective.draws.images, minlength=359)
    assert set(uses.tolist()) == {1, 2}


def test_the_same_candidate_has_the_same_loss_whatever_the_batch_size(denoiser: Denoiser) -> None:
    first = held_out_loss(denoiser, num=40, batch_size=7)(denoiser, go_on)
    assert held_out_loss(denoiser, num=40, batch_size=40)(denoiser, go_on) == pytest.approx(first)
    assert held_out_loss(denoiser, num=40, seed=1)(denoiser, go_on) != pytest.approx(first)


def test_the_distance_is_that_of_images_drawn_from_the_seed_of_the_search(
    denoiser: Denoiser,
) -> None:
    objective = open_distance(denoiser)
    assert objective.label == "Fréchet distance on digits"
    assert objective.protocol["name"] == "frechet_digits"
    assert (objective.protocol["split"], objective.protocol["reference_n"]) == ("train", 1438)
    extractor = load_extractor("digits")
    made, real = RunningStatistics(), RunningStatistics()
    made.add(extractor.features(collect_images(single(denoiser), SAMPLE)))
    train = open_images("digits", shape=(1, 8, 8), split="train")
    pixels = train.batch(range(len(train))).permute(0, 2, 3, 1).numpy()
    real.add(extractor.features(pixels))
    a, b = made.statistics(), real.statistics()
    expected = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert objective(denoiser, go_on) == pytest.approx(expected, rel=1e-6)


def test_a_candidate_whose_images_are_not_finite_has_no_distance(denoiser: Denoiser) -> None:
    for parameter in denoiser.network.parameters():
        parameter.fill_(float("nan"))
    assert np.isnan(open_distance(denoiser)(denoiser, go_on))
    assert np.isnan(held_out_loss(denoiser, num=4)(denoiser, go_on))


def test_an_objective_stops_between_batches(denoiser: Denoiser) -> None:
    def stop() -> None:
        raise Stopped("enough", exit_code=75)

    for objective in (held_out_loss(denoiser, num=4), open_distance(denoiser)):
        with pytest.raises(Stopped):
            objective(denoiser, stop)


@pytest.mark.parametrize("coefficients", [(0, 0), (1, 0), (0.5, 0.5), (0.3, -0.7)])
def test_a_candidate_in_memory_has_the_weights_of_the_merged_file(
    family: Family, tmp_path: Path, coefficients: tuple[float, float]
) -> None:
    network = CandidateNetwork(family, device="cpu", dtype="fp32")
    network.at((9.0, -3.0))  # nothing of an earlier candidate stays
    weights = network.at(coefficients).network.state_dict()
    output = tmp_path / "merged.safetensors"
    paths = [parent.path for parent in family.parents]
    merge_artifacts(family.base.path, paths, coefficients, output)
    for name, expected in load_tensors(output).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)


def test_a_candidate_in_bfloat16_is_rounded_once(family: Family) -> None:
    wide = CandidateNetwork(family, device="cpu", dtype="fp32").at((0.5, 0.5)).network.state_dict()
    narrow = CandidateNetwork(family, device="cpu", dtype="bf16").at((0.5, 0.5))
    for name, tensor in narrow.network.state_dict().items():
        assert torch.equal(tensor, wide[name].bfloat16())


def test_candidates_of_block_experts_carry_merged_projections(
    family: Family, tmp_path: Path
) -> None:
    parents = []
    for parent, size in zip(family.parents, (0.1, 0.3), strict=True):
        weights = load_tensors(parent.path)
        for block, width in {"down_blocks_0": 8, "down_blocks_1": 16, "mid_block": 16,
                             "up_blocks_0": 16, "up_blocks_1": 8}.items():  # fmt: skip
            weights[f"{PREFIX}.{block}.weight"] = torch.eye(width) + size
        write_artifact(parent.path, weights, replace(parent.record, projection="block"))
        parents.append(parent.path)
    blocks = open_family(family.base.path, open_parents(parents, "expert"))
    weights = CandidateNetwork(blocks, device="cpu", dtype="fp32").at((1.0, 0.5)).network
    found = weights.state_dict()[f"{PREFIX}.mid_block.weight"]
    torch.testing.assert_close(found, torch.eye(16) + 0.1 + 0.5 * 0.3)


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Twelve colour images of two sizes, each with a caption and a class."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for index in range(12):
        pixels = rng.integers(0, 256, (16 + index % 2, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        rows.append({"file_name": f"{index:02d}.png", "text": f"thing {index}", "label": index % 3})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def small_features(tmp_path: Path) -> str:
    """A feature network of twelve means of an image, as TorchScript."""

    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

    return str(save_script(Means(), tmp_path / "means.pt"))


def open_latent(name: str, pipelines: Callable, tmp_path: Path) -> Denoiser:
    model = import_model(str(pipelines(name)))
    path = tmp_path / f"{name}.safetensors"
    write_artifact(path, model.weights, base_record(model))
    return load_denoiser(path)


@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
def test_the_loss_of_a_latent_model_is_told_what_its_images_show(
    name: str, pipelines: Callable, captioned: Path, tmp_path: Path
) -> None:
    denoiser = open_latent(name, pipelines, tmp_path)
    objective = open_objective(
        MergeConfig(num=5, batch_size=2, seed=3), denoiser.record,
        images=DataConfig(source=str(captioned)), sample=SAMPLE, features="digits", resize="clean",
        device="cpu", cache="auto", beside=tmp_path,
    )  # fmt: skip
    list(fill_caches(objective.examples))
    companions = open_companions(denoiser.record)
    data = open_images(
        str(captioned), shape=(3, 16, 16), split="held-out", wants=companions.wants
    )  # its one image is the last
    subjects = data.captions([0]) if companions.wants == "text" else data.labels([0])
    x0 = companions.latents(*companions.encode_images(to_unit(data.batch([0]))), None)
    errors = []
    for index, t in enumerate(objective.draws.t):
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(image_seed(3, index)))
        schedule, t = denoiser.schedule, t[None]
        x_t, told = schedule.add_noise(x0, eps, t), companions.conditions(subjects)
        with torch.no_grad():
            output = predict(denoiser.network, x_t, schedule.times(t), told)
        errors.append((schedule.target(x0, eps, t) - output).square().mean())
    expected = torch.stack(errors).double().mean().item()
    assert objective(denoiser, go_on) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prompts", [None, "text:a red cat"])
def test_the_distance_of_a_text_model_draws_captions_or_the_prompts_of_the_run(
    pipelines: Callable, captioned: Path, small_features: str, tmp_path: Path, prompts: str | None
) -> None:
    denoiser = open_latent("sd", pipelines, tmp_path)
    sample = SampleConfig(num=13, steps=2, seed=5, batch_size=8, prompts=prompts)
    objective = open_objective(
        MergeConfig(objective="fid"), denoiser.record, images=DataConfig(source=str(captioned)),
        sample=sample, features=small_features, resize="clean", device="cpu",
    )  # fmt: skip
    shown = objective._scene.prompts
    things = [f"thing {index % 11}" for index in range(13)]  # the twelfth is held out
    assert shown == (["a red cat"] * 13 if prompts else things)
    assert objective.protocol["prompts"]["n"] == (1 if prompts else 11)
    assert objective.protocol["sampler"] == "ddim"
    images = collect_images(single(denoiser), sample, scene=objective._scene)
    assert images.shape == (13, 16, 16, 3)
    extractor, made, real = load_extractor(small_features), RunningStatistics(), RunningStatistics()
    made.add(extractor.features(images))
    train = open_images(str(captioned), shape=(3, 16, 16), split="train")
    real.add(extractor.features(train.batch(range(11)).permute(0, 2, 3, 1).numpy()))
    a, b = made.statistics(), real.statistics()
    expected = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert objective(denoiser, go_on) == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_a_class_model_draws_its_classes_in_turn(
    pipelines: Callable, captioned: Path, small_features: str, tmp_path: Path
) -> None:
    denoiser = open_latent("dit", pipelines, tmp_path)
    objective = open_objective(
        MergeConfig(objective="fid"), denoiser.record, images=DataConfig(source=str(captioned)),
        sample=SampleConfig(num=13, steps=2, batch_size=16), features=small_features,
        resize="clean", device="cpu",
    )  # fmt: skip
    assert objective._scene.classes == [index % 10 for index in range(13)]
    assert np.isfinite(objective(denoiser, go_on))
