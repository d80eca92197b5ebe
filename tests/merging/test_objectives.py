"""What a search minimises, against plain computations draw by draw and image by image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import collect_images, write_tiny_base, write_tiny_expert
from PIL import Image
from stand_ins import save_script
from torch import Tensor

from deme_cli.artifacts import record_of, write_artifact
from deme_cli.config import MergeConfig, SampleConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.checkpoints import import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.errors import Stopped
from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.frechet import RunningStatistics, frechet_distance
from deme_cli.evaluation.kid import kernel_distance
from deme_cli.files import read_header
from deme_cli.merging.candidates import Workbench
from deme_cli.merging.inputs import Inputs
from deme_cli.merging.objectives import ExpertsLoss, HeldOutLoss, Objective
from deme_cli.merging.plan import REPORT, SEARCH, MergePlan
from deme_cli.merging.search import Stage
from deme_cli.run_file import RunFile
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


def held_out_loss(denoiser: Denoiser, part: int | None = None, **settings: object) -> HeldOutLoss:
    digits = PixelExamples(open_images("digits", shape=(1, 8, 8), split="held-out"))
    return HeldOutLoss(digits, denoiser.schedule, MergeConfig(**settings), part)


def open_bench(base: Path, **tables: dict) -> Workbench:
    """What measures candidates of a base, on the digits if no table says otherwise."""
    header = read_header(base)
    run = RunFile(tables={"data": {"source": "digits"}, **tables})
    inputs = Inputs(header, record_of(header), ())
    return Workbench(MergePlan(run, inputs, MergeConfig(), Path("merged.safetensors")))


def open_distance(
    base: Path, name: str = "fid", num: int = 24, *, part: int = SEARCH,
    settings: MergeConfig = SETTINGS, **tables: dict,
) -> Objective:  # fmt: skip
    return open_bench(base, **tables).open(Stage(name, num, 1), settings, part)


def draws_of(objective: HeldOutLoss) -> Iterator[tuple[Tensor, Tensor, int]]:
    """x_t, eps and t of each draw, one by one and by the formulas."""
    data, schedule = objective.draws.examples.data, objective.draws.schedule
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


def test_search_and_report_see_two_halves_of_the_held_out_images(
    denoiser: Denoiser, tmp_path: Path
) -> None:
    bench = open_bench(tmp_path / "base.safetensors")
    first, second = (
        bench.open(Stage("loss", 400, 1), MergeConfig(seed=3), part) for part in (SEARCH, REPORT)
    )
    whole = held_out_loss(denoiser, num=400, seed=3)
    seen = [set(one.draws.images.tolist()) for one in (first, second, whole)]
    assert seen[0] & seen[1] == set()
    assert seen[0] | seen[1] == seen[2] == set(range(359))
    assert [one.protocol["split"] for one in (first, second, whole)] == [
        "held-out, part 1 of 2", "held-out, part 2 of 2", "held-out",
    ]  # fmt: skip
    for one in (first, second):
        uses = torch.bincount(one.draws.images)
        assert set(uses[uses > 0].tolist()) <= {2, 3}
    strata = torch.bincount(whole.draws.t // 20, minlength=5)
    assert strata.tolist() == [80] * 5, "every part of the horizon is used evenly"
    again = held_out_loss(denoiser, SEARCH, num=400, seed=3)
    assert again.draws.images.tolist() == first.draws.images.tolist()
    assert again.protocol == first.protocol


def test_a_range_takes_the_place_of_the_horizon(denoiser: Denoiser) -> None:
    objective = held_out_loss(denoiser, num=50, loss_range="30:40")
    assert torch.bincount(objective.draws.t).tolist() == [0] * 30 + [5] * 10


def test_the_distance_to_the_experts_is_that_of_outputs_on_their_own_timesteps(
    denoiser: Denoiser, experts: list[SamplingExpert]
) -> None:
    plain = held_out_loss(denoiser, num=15, batch_size=4, seed=3)
    objective = ExpertsLoss(
        plain.draws.examples, denoiser.schedule, MergeConfig(num=15, batch_size=4, seed=3), experts
    )
    assert objective(experts, go_on) == 0
    networks = [expert.load().network for expert in experts]
    errors = []
    for x_t, _, t in draws_of(objective):
        time = torch.tensor([t])
        said = predict(networks[t >= 40], x_t, time)
        errors.append((said - predict(denoiser.network, x_t, time)).square().mean())
    expected = torch.stack(errors).double().mean().item()
    assert objective(single(denoiser), go_on) == pytest.approx(expected, rel=1e-4)


def features_of(experts: Sequence[SamplingExpert], num: int) -> np.ndarray:
    """Features of the images that the seed of SETTINGS draws."""
    sample = SampleConfig(num=num, steps=3, seed=5, batch_size=16)
    return load_extractor("digits").features(collect_images(experts, sample))


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
    denoiser: Denoiser, experts: list[SamplingExpert], tmp_path: Path, part: int, split: str, n: int
) -> None:
    data = open_images("digits", shape=(1, 8, 8), split=split)
    pixels = data.batch(range(len(data))).permute(0, 2, 3, 1).numpy()
    real, features = load_extractor("digits").features(pixels), features_of(single(denoiser), 24)
    base = tmp_path / "base.safetensors"
    fid, kid = (open_distance(base, name, part=part) for name in ("fid", "kid"))
    for objective in (fid, kid):
        protocol = objective.protocol
        assert (protocol["split"], protocol["reference_n"], protocol["num"]) == (split, n, 24)
        assert protocol["name"] == objective.name
    assert (fid.name, kid.name) == ("frechet_digits", "kernel_digits")
    assert fid(single(denoiser), go_on) == pytest.approx(frechet(features, real), rel=1e-6)
    expected = kernel_distance(features.astype(np.float32), real.astype(np.float32), seed=5)
    assert kid(single(denoiser), go_on) == pytest.approx(expected, rel=1e-6)
    together = frechet(features_of(experts, 24), real)  # an ensemble, expert by expert
    assert fid(experts, go_on) == pytest.approx(together, rel=1e-6)


def test_the_report_may_have_a_reference_of_its_own(denoiser: Denoiser, image_folder: Path) -> None:
    folder = str(image_folder)
    search, report = (
        open_distance(image_folder.parent / "base.safetensors", "kid", part=part,
                      eval={"kid": folder}).protocol
        for part in (SEARCH, REPORT)
    )  # fmt: skip
    assert search["reference"] == "digits"
    assert (report["reference"], report["reference_n"]) == (folder, 10)
    assert report["reference_sha256"] == open_images(folder, shape=None, split="all").fingerprint


def test_a_candidate_whose_images_are_not_finite_has_no_objective_and_a_check_may_stop(
    denoiser: Denoiser, tmp_path: Path
) -> None:
    def stop(*progress: int) -> None:
        raise Stopped("enough", exit_code=75)

    objectives = (held_out_loss(denoiser, num=4), open_distance(tmp_path / "base.safetensors"))
    for objective in objectives:
        with pytest.raises(Stopped):
            objective(single(denoiser), stop)
    for parameter in denoiser.network.parameters():
        parameter.fill_(float("nan"))
    assert all(np.isnan(objective(single(denoiser), go_on)) for objective in objectives)


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


def write_latent(name: str, pipelines: Callable, tmp_path: Path) -> Path:
    model = import_model(str(pipelines(name)))
    write_artifact(tmp_path / f"{name}.safetensors", model.weights, model.record)
    return tmp_path / f"{name}.safetensors"


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_the_loss_of_a_latent_model_is_told_what_its_images_show(
    name: str, pipelines: Callable, captioned: Path, tmp_path: Path
) -> None:
    base = write_latent(name, pipelines, tmp_path)
    denoiser = load_denoiser(base)
    bench = open_bench(base, data={"source": str(captioned)})
    objective = bench.open(Stage("loss", 5, 1), MergeConfig(batch_size=2, seed=3))
    fill_caches(objective.draws.examples)
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
    base = write_latent("sd", pipelines, tmp_path)
    denoiser = load_denoiser(base)
    objective = open_distance(
        base, num=13, data={"source": str(captioned)},
        sample={"prompts": prompts} if prompts else {}, eval={"features": small_features},
        settings=MergeConfig(steps=2, seed=5, batch_size=8),
    )  # fmt: skip
    shown = objective._conditioning.prompts
    things = [f"thing {index % 11}" for index in range(13)]  # the twelfth is held out
    assert shown == (["a red cat"] * 13 if prompts else things)
    assert objective.protocol["prompts"]["n"] == (1 if prompts else 11)
    sample = SampleConfig(num=13, steps=2, seed=5, batch_size=8, sampler="pndm")
    images = collect_images(single(denoiser), sample, conditioning=objective._conditioning)
    extractor = load_extractor(small_features)
    train = open_images(str(captioned), shape=(3, 16, 16), split="train")
    real = extractor.features(train.batch(range(11)).permute(0, 2, 3, 1).numpy())
    expected = frechet(extractor.features(images), real)
    assert objective(single(denoiser), go_on) == pytest.approx(expected, rel=1e-6)
