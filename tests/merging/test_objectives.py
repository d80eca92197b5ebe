from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import collect_images, write_tiny_base, write_tiny_expert
from PIL import Image
from stand_ins import save_script
from torch import Tensor

from deme_cli.artifacts import write_artifact
from deme_cli.config import DataConfig, MergeConfig, SampleConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.checkpoints import import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.errors import Stopped
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.merging.objectives import (
    REPORT,
    SEARCH,
    ExpertsLoss,
    FeatureStore,
    HeldOutLoss,
    Objective,
    Workbench,
)
from deme_cli.merging.plan import Measure
from deme_cli.merging.successive_halving import Stage
from deme_cli.sampling.ensemble import SamplingExpert, single
from deme_cli.sampling.sampler import image_seed
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import PixelExamples, fill_caches

SETTINGS = MergeConfig(steps=3, seed=5, batch_size=16)


def go_on(*progress: int) -> None:
    """A check that never stops."""


@pytest.fixture
def denoiser(tmp_path: Path) -> Denoiser:
    write_tiny_base(tmp_path / "base.safetensors")
    return load_denoiser(tmp_path / "base.safetensors")


@pytest.fixture
def experts(tmp_path: Path, denoiser: Denoiser) -> list[SamplingExpert]:
    """Two experts, of 0:40 and 40:100."""
    found = []
    for index, span in enumerate((TimestepRange(0, 40), TimestepRange(40, 100)), start=1):
        path = tmp_path / f"ft_{index}of2.safetensors"
        write_tiny_expert(path, tmp_path / "base.safetensors", index=index, of=2)
        found.append(SamplingExpert(span, partial(load_denoiser, path)))
    return found


def digits(split: str = "held-out") -> PixelExamples:
    return PixelExamples(open_images("digits", shape=(1, 8, 8), split=split))


def held_out_loss(denoiser: Denoiser, part: int | None = None, **settings: int) -> HeldOutLoss:
    return HeldOutLoss(digits(), denoiser.schedule, MergeConfig(**settings), part)


def open_bench(
    denoiser: Denoiser, store: FeatureStore | None = None, **fields: object
) -> Workbench:
    """A workbench on the digits and their features."""
    place = {"images": DataConfig(source="digits"), "features": "digits", "resize": "clean"}
    measure = Measure(**{**place, "sample": SampleConfig(), **fields})
    return Workbench(measure, denoiser.record, store=store)


def open_distance(
    denoiser: Denoiser, name: str = "fid", num: int = 24, *, part: int = SEARCH,
    store: FeatureStore | None = None, settings: MergeConfig = SETTINGS, **fields: object,
) -> Objective:  # fmt: skip
    return open_bench(denoiser, store, **fields).open(Stage(name, num, 1), settings, part=part)


def draws_of(objective: HeldOutLoss) -> Iterator[tuple[Tensor, Tensor, int]]:
    """x_t, eps and t of each draw, one by one and by the formulas."""
    data, schedule = objective.examples.data, objective.draws.schedule
    for index, (image, t) in enumerate(
        zip(objective.draws.images.tolist(), objective.draws.t.tolist(), strict=True)
    ):
        generator = torch.Generator().manual_seed(image_seed(objective.protocol["seed"], index))
        eps = torch.randn(1, 1, 8, 8, generator=generator)
        abar = schedule.alphas_cumprod[t]
        x0 = to_unit(data.batch([image]))
        yield (abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float(), eps, t


def test_the_loss_is_the_mean_over_its_draws_one_by_one(denoiser: Denoiser) -> None:
    objective = held_out_loss(denoiser, num=12, batch_size=5, seed=3)
    errors = [
        (eps - predict(denoiser.network, x_t, torch.tensor([t]))).square().mean()
        for x_t, eps, t in draws_of(objective)
    ]
    expected = torch.stack(errors).double()
    assert objective(single(denoiser), go_on) == pytest.approx(expected.mean().item(), rel=1e-5)
    found = objective.errors(single(denoiser), go_on)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_loss_of_an_ensemble_is_that_of_each_expert_on_its_own_timesteps(
    denoiser: Denoiser, experts: list[SamplingExpert]
) -> None:
    objective = held_out_loss(denoiser, num=15, batch_size=4, seed=3)
    networks = [expert.load().network for expert in experts]
    errors = [
        (eps - predict(networks[t >= 40], x_t, torch.tensor([t]))).square().mean()
        for x_t, eps, t in draws_of(objective)
    ]
    expected = torch.stack(errors).double()
    for order in (experts, experts[::-1]):
        found = objective.errors(order, go_on)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    alone = objective.errors(single(experts[0].load()), go_on)
    assert (~torch.isclose(alone, expected, rtol=1e-5)).sum() == 9, (
        "the draws of the other expert's 60 timesteps"
    )


def test_the_loss_and_its_gradient_are_those_of_autograd(denoiser: Denoiser) -> None:
    objective = held_out_loss(denoiser, num=11, batch_size=4, seed=3)
    parameters = dict(denoiser.network.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    losses = [
        (eps - predict(denoiser.network, x_t, torch.tensor([t]))).square().mean()
        for x_t, eps, t in draws_of(objective)
    ]
    loss = torch.stack(losses).mean()
    expected = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    )
    for _ in range(2):  # nothing of the first is left
        found = objective.value_and_gradient(denoiser, go_on)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)
    assert found == pytest.approx(objective(single(denoiser), go_on), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_search_and_report_see_two_halves_of_the_held_out_images(denoiser: Denoiser) -> None:
    first, second, whole = (
        held_out_loss(denoiser, part, num=400) for part in (SEARCH, REPORT, None)
    )
    seen = [set(one.draws.images.tolist()) for one in (first, second, whole)]
    assert seen[0] & seen[1] == set()
    assert seen[0] | seen[1] == seen[2] == set(range(359))
    assert [one.protocol["split"] for one in (first, second, whole)] == [
        "held-out, part 1 of 2", "held-out, part 2 of 2", "held-out",
    ]  # fmt: skip
    for one in (first, second):
        assert set(
            torch.bincount(one.draws.images)[list(set(one.draws.images.tolist()))].tolist()
        ) <= {2, 3}


def test_a_workbench_opens_the_loss_on_the_part_that_is_asked_for(denoiser: Denoiser) -> None:
    bench = open_bench(denoiser)
    for part in (SEARCH, REPORT):
        found = bench.open(Stage("loss", 20, 1), MergeConfig(num=7, seed=3), part=part)
        expected = held_out_loss(denoiser, part, num=20, seed=3)
        assert found.draws.images.tolist() == expected.draws.images.tolist()
        assert found(single(denoiser), go_on) == expected(single(denoiser), go_on)
        assert found.protocol == expected.protocol


def test_the_distance_to_the_experts_is_that_of_outputs_on_their_own_timesteps(
    denoiser: Denoiser, experts: list[SamplingExpert]
) -> None:
    settings = MergeConfig(num=15, batch_size=4, seed=3)
    objective = ExpertsLoss(digits(), denoiser.schedule, settings, experts)
    assert objective(experts, go_on) == 0
    networks = [expert.load().network for expert in experts]
    errors = []
    for x_t, _, t in draws_of(objective):
        time = torch.tensor([t])
        said = predict(networks[t >= 40], x_t, time)
        errors.append((said - predict(denoiser.network, x_t, time)).square().mean())
    expected = torch.stack(errors).double().mean().item()
    assert objective(single(denoiser), go_on) == pytest.approx(expected, rel=1e-4)
    found = open_bench(denoiser).open(
        Stage("experts", 15, 1), settings, part=SEARCH, experts=lambda: experts
    )
    assert found.name == "experts"
    assert found(experts, go_on) == 0


def test_the_draws_use_every_image_and_every_part_of_the_horizon_evenly(denoiser: Denoiser) -> None:
    objective = held_out_loss(denoiser, num=500)
    strata = torch.bincount(objective.draws.t // 20, minlength=5)
    assert strata.tolist() == [100] * 5
    uses = torch.bincount(objective.draws.images, minlength=359)
    assert set(uses.tolist()) == {1, 2}


def test_the_same_candidate_has_the_same_loss_whatever_the_batch_size(denoiser: Denoiser) -> None:
    first = held_out_loss(denoiser, num=40, batch_size=7)(single(denoiser), go_on)
    assert held_out_loss(denoiser, num=40, batch_size=40)(single(denoiser), go_on) == pytest.approx(
        first
    )
    assert held_out_loss(denoiser, num=40, seed=1)(single(denoiser), go_on) != pytest.approx(first)


def features_of(experts: list[SamplingExpert], num: int) -> np.ndarray:
    """Features of the images that the seed of SETTINGS draws."""
    sample = SampleConfig(num=num, steps=3, seed=5, batch_size=16)
    return load_extractor("digits").features(collect_images(experts, sample))


def real_features(split: str) -> np.ndarray:
    data = open_images("digits", shape=(1, 8, 8), split=split)
    return load_extractor("digits").features(
        data.batch(range(len(data))).permute(0, 2, 3, 1).numpy()
    )


def frechet(features: np.ndarray, real: np.ndarray) -> float:
    made, reference = RunningStatistics(), RunningStatistics()
    made.add(features)
    reference.add(real)
    a, b = made.statistics(), reference.statistics()
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


@pytest.mark.parametrize(
    ("part", "split", "n"), [(SEARCH, "train", 1438), (REPORT, "held-out", 359)]
)
def test_distances_are_those_of_images_drawn_from_the_seed_to_their_part_of_the_data(
    denoiser: Denoiser, part: int, split: str, n: int
) -> None:
    features, real = features_of(single(denoiser), 24), real_features(split)
    fid, kid = (open_distance(denoiser, name, part=part) for name in ("fid", "kid"))
    for objective in (fid, kid):
        protocol = objective.protocol
        assert (protocol["split"], protocol["reference_n"], protocol["num"]) == (split, n, 24)
        assert protocol["name"] == objective.name
    assert (fid.name, fid.label) == ("frechet_digits", "Fréchet distance on digits")
    assert (kid.name, kid.label) == ("kernel_digits", "kernel distance on digits")
    assert fid(single(denoiser), go_on) == pytest.approx(frechet(features, real), rel=1e-6)
    expected = kernel_distance(features.astype(np.float32), real.astype(np.float32), seed=5)
    assert kid(single(denoiser), go_on) == pytest.approx(expected, rel=1e-6)


def test_the_report_may_have_a_reference_of_its_own(denoiser: Denoiser, tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image, mode="L").save(folder / f"{index:02d}.png")
    found = {
        part: open_distance(denoiser, "kid", part=part, report_reference=str(folder)).protocol
        for part in (SEARCH, REPORT)
    }
    assert found[SEARCH]["reference"] == "digits"
    assert (found[REPORT]["reference"], found[REPORT]["reference_n"]) == (str(folder), 40)
    images = open_images(str(folder), shape=None, split="all")
    assert found[REPORT]["reference_sha256"] == images.fingerprint


def test_an_ensemble_is_sampled_expert_by_expert(
    denoiser: Denoiser, experts: list[SamplingExpert]
) -> None:
    expected = frechet(features_of(experts, 24), real_features("train"))
    assert open_distance(denoiser)(experts, go_on) == pytest.approx(expected, rel=1e-6)


class Forwards:
    """Counts the forwards of an objective: three for each batch of images."""

    def __init__(self) -> None:
        self.count = 0
        self.last = (0, 0)

    def __call__(self, done: int = 0, total: int = 0) -> None:
        self.count += 1
        self.last = (done, total)


def test_what_a_lower_rung_has_drawn_is_not_drawn_again(denoiser: Denoiser, tmp_path: Path) -> None:
    store, settings = FeatureStore(tmp_path / "features"), replace(SETTINGS, batch_size=8)
    few = open_distance(denoiser, "kid", 8, store=store, settings=settings)
    many = open_distance(denoiser, "fid", 24, store=store, settings=settings)
    plain = open_distance(denoiser, "fid", 24, settings=settings)
    expected = plain(single(denoiser), go_on)
    first = open_distance(denoiser, "kid", 8, settings=settings)(single(denoiser), go_on)

    def forwards(objective: Objective, key: str) -> int:
        counted = Forwards()
        value = objective(single(denoiser), counted, key)
        if objective in (few, many):
            assert value == pytest.approx(first if objective is few else expected, rel=1e-6)
        if objective is many:
            assert counted.last in ((24, 24), (0, 0))
        return counted.count

    assert forwards(few, "a") == 3
    assert forwards(many, "a") == 6, "the 16 that are missing"
    assert forwards(many, "a") == 0
    assert forwards(few, "a") == 0, "the first 8 of 24"
    assert forwards(many, "b") == 9, "another candidate"
    assert forwards(many, "") == 9, "nobody said which"
    other = open_distance(denoiser, "fid", 24, store=store, settings=replace(settings, seed=6))
    assert forwards(other, "a") == 9, "other noise"
    report = open_distance(denoiser, "fid", 24, store=store, settings=settings, part=REPORT)
    assert forwards(report, "a") == 9, "the report draws its own"
    for path in store.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert forwards(many, "a") == 9, "what is not whole counts as nothing"
    store.clear()
    assert not store.folder.exists()
    assert forwards(many, "a") == 9


def test_the_kept_features_of_the_same_images_give_the_same_distance(
    denoiser: Denoiser, tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path / "features")
    with_store = open_distance(denoiser, "kid", 24, store=store)
    expected = open_distance(denoiser, "kid", 24)(single(denoiser), go_on)
    assert with_store(single(denoiser), go_on, "a") == expected
    assert with_store(single(denoiser), go_on, "a") == expected


def test_images_that_are_not_finite_are_not_kept(denoiser: Denoiser, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    for parameter in denoiser.network.parameters():
        parameter.fill_(float("nan"))
    assert np.isnan(open_distance(denoiser, store=store)(single(denoiser), go_on, "a"))
    assert not store.folder.exists() or not list(store.folder.iterdir())


def test_a_candidate_whose_images_are_not_finite_has_no_distance(denoiser: Denoiser) -> None:
    for parameter in denoiser.network.parameters():
        parameter.fill_(float("nan"))
    assert np.isnan(open_distance(denoiser)(single(denoiser), go_on))
    assert np.isnan(held_out_loss(denoiser, num=4)(single(denoiser), go_on))


def test_an_objective_stops_between_batches(denoiser: Denoiser) -> None:
    def stop(*progress: int) -> None:
        raise Stopped("enough", exit_code=75)

    for objective in (held_out_loss(denoiser, num=4), open_distance(denoiser)):
        with pytest.raises(Stopped):
            objective(single(denoiser), stop)


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
    write_artifact(path, model.weights, model.record)
    return load_denoiser(path)


@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
def test_the_loss_of_a_latent_model_is_told_what_its_images_show(
    name: str, pipelines: Callable, captioned: Path, tmp_path: Path
) -> None:
    denoiser = open_latent(name, pipelines, tmp_path)
    bench = open_bench(
        denoiser, images=DataConfig(source=str(captioned)), cache="auto", beside=tmp_path
    )
    objective = bench.open(Stage("loss", 5, 1), MergeConfig(batch_size=2, seed=3))
    fill_caches(objective.examples)
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
    assert objective(single(denoiser), go_on) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prompts", [None, "text:a red cat"])
def test_the_distance_of_a_text_model_draws_captions_or_the_prompts_of_the_run(
    pipelines: Callable, captioned: Path, small_features: str, tmp_path: Path, prompts: str | None
) -> None:
    denoiser = open_latent("sd", pipelines, tmp_path)
    sample = SampleConfig(num=13, steps=2, seed=5, batch_size=8, prompts=prompts)
    objective = open_distance(
        denoiser, num=13, images=DataConfig(source=str(captioned)), sample=sample,
        features=small_features, settings=MergeConfig(steps=2, seed=5, batch_size=8),
    )  # fmt: skip
    shown = objective._conditioning.prompts
    things = [f"thing {index % 11}" for index in range(13)]  # the twelfth is held out
    assert shown == (["a red cat"] * 13 if prompts else things)
    assert objective.protocol["prompts"]["n"] == (1 if prompts else 11)
    assert objective.protocol["sampler"] == "pndm"
    images = collect_images(single(denoiser), sample, conditioning=objective._conditioning)
    assert images.shape == (13, 16, 16, 3)
    extractor, made, real = load_extractor(small_features), RunningStatistics(), RunningStatistics()
    made.add(extractor.features(images))
    train = open_images(str(captioned), shape=(3, 16, 16), split="train")
    real.add(extractor.features(train.batch(range(11)).permute(0, 2, 3, 1).numpy()))
    a, b = made.statistics(), real.statistics()
    expected = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert objective(single(denoiser), go_on) == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_a_class_model_draws_its_classes_in_turn(
    pipelines: Callable, captioned: Path, small_features: str, tmp_path: Path
) -> None:
    denoiser = open_latent("dit", pipelines, tmp_path)
    objective = open_distance(
        denoiser, num=13, images=DataConfig(source=str(captioned)), features=small_features,
        settings=MergeConfig(steps=2, batch_size=16),
    )  # fmt: skip
    assert objective._conditioning.classes == [index % 10 for index in range(13)]
    assert np.isfinite(objective(single(denoiser), go_on))
