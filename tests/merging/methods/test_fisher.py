"""Fisher-weighted merging against Eq. 5 with gradients of one example at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from torch import Tensor

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.checkpoints import base_record, import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import NumericsError
from deme_cli.merging.lineage import Family, open_family, open_parents
from deme_cli.merging.methods.data_driven import DataProgress, MergedWeights
from deme_cli.merging.methods.fisher import FLOOR, merge_fisher
from deme_cli.merging.methods.range_draws import RangeDraws
from deme_cli.sampling.sampler import image_seed
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import Examples, PixelExamples
from deme_cli.training.materials import open_examples

SEED = 3


def write_experts(folder: Path, *, scale: float = 0.05) -> Family:
    """Two experts of the base in a folder."""
    base = folder / "base.safetensors"
    experts = [folder / f"ft_{index}of2.safetensors" for index in (1, 2)]
    for index, path in enumerate(experts, start=1):
        write_tiny_expert(path, base, index=index, of=2, scale=scale)
    return open_family(base, open_parents(experts, "expert"))


@pytest.fixture
def family(tmp_path: Path) -> Family:
    write_tiny_base(tmp_path / "base.safetensors")
    return write_experts(tmp_path)


@pytest.fixture(scope="module")
def digits() -> Examples:
    return PixelExamples(open_images("digits", shape=(1, 8, 8), split="train"))


def draws_of(
    family: Family, examples: Examples, *, num: int = 6, batch_size: int = 4
) -> RangeDraws:
    schedule = read_schedule(family.base_record.scheduler_config)
    return RangeDraws(examples, schedule, num=num, batch_size=batch_size, seed=SEED)


def finish(merge: Iterator[DataProgress | MergedWeights]) -> MergedWeights:
    *_, last = merge
    assert isinstance(last, MergedWeights)
    return last


def fisher_of(path: Path, draws: RangeDraws, span: TimestepRange) -> dict[str, Tensor]:
    """The mean of (d loss / d theta)^2, by loss.backward() of one image after another."""
    network = load_denoiser(path).network.requires_grad_(True)
    data = open_images("digits", shape=(1, 8, 8), split="train")
    fisher = {name: torch.zeros(value.shape) for name, value in network.named_parameters()}
    timesteps = draws.timesteps(span)
    for index, image in enumerate(draws.images().tolist()):
        generator = torch.Generator().manual_seed(image_seed(SEED, index))
        eps, t = torch.randn(1, 1, 8, 8, generator=generator), timesteps[index]
        abar = draws.schedule.alphas_cumprod[t]
        x_t = (abar.sqrt() * to_unit(data.batch([image])) + (1 - abar).sqrt() * eps).float()
        network.zero_grad()
        (network(x_t, t[None]).sample - eps).square().mean().backward()
        for name, parameter in network.named_parameters():
            fisher[name] += parameter.grad.square() / draws.num
    return fisher


@pytest.mark.parametrize("normalize", [True, False])
def test_every_parameter_is_the_published_weighted_mean(
    family: Family, digits: Examples, normalize: bool
) -> None:
    draws, coefficients = draws_of(family, digits), [1.0, 3.0]
    merged = finish(merge_fisher(family, draws, normalize=normalize, coefficients=coefficients))
    fishers = [fisher_of(parent.path, draws, parent.record.timesteps) for parent in family.parents]
    norms = [torch.cat([f.flatten() for f in one.values()]).norm().item() for one in fishers]
    assert merged.details["fisher_norms"] == pytest.approx(norms, rel=1e-4)
    scales = [w / (n if normalize else 1) for w, n in zip(coefficients, norms, strict=True)]
    experts = [load_tensors(parent.path) for parent in family.parents]
    weighed = {
        name: [scale * fisher[name] for scale, fisher in zip(scales, fishers, strict=True)]
        for name in experts[0]
    }
    typical = torch.cat([sum(values).flatten() for values in weighed.values()]).mean()
    num_decided = 0
    for name, (first, second) in weighed.items():
        expected = (first * experts[0][name] + second * experts[1][name]) / (first + second)
        decided = first + second > 1e4 * FLOOR * typical
        torch.testing.assert_close(
            merged.weights[name][decided], expected[decided], atol=1e-4, rtol=1e-3
        )
        num_decided += int(decided.sum())
    assert num_decided > 0.5 * sum(tensor.numel() for tensor in experts[0].values())


def test_parameters_without_gradient_take_the_plain_weighted_mean(
    family: Family, digits: Examples
) -> None:
    merged = finish(merge_fisher(family, draws_of(family, digits), coefficients=[1, 3])).weights
    first, second = (load_tensors(parent.path) for parent in family.parents)
    keys = [name for name in merged if name.endswith("to_k.bias")]  # softmax does not see them
    assert keys
    for name in keys:
        expected = 0.25 * first[name] + 0.75 * second[name]
        torch.testing.assert_close(merged[name], expected, atol=1e-4, rtol=1e-3)


def test_an_expert_of_coefficient_0_does_not_count(family: Family, digits: Examples) -> None:
    merged = finish(merge_fisher(family, draws_of(family, digits), coefficients=[0, 2])).weights
    for name, tensor in load_tensors(family.parents[1].path).items():
        torch.testing.assert_close(merged[name], tensor)


def test_equal_experts_give_the_expert(tmp_path: Path, digits: Examples) -> None:
    write_tiny_base(tmp_path / "base.safetensors")
    family = write_experts(tmp_path, scale=0.0)
    merged = finish(merge_fisher(family, draws_of(family, digits))).weights
    for name, tensor in load_tensors(family.parents[0].path).items():
        assert torch.equal(merged[name], tensor), name


def test_progress_counts_images_and_batches_do_not_change_the_result(
    family: Family, digits: Examples
) -> None:
    *steps, whole = merge_fisher(family, draws_of(family, digits))
    assert [(step.done, step.total) for step in steps] == [(4, 12), (6, 12), (10, 12), (12, 12)]
    parts = finish(merge_fisher(family, draws_of(family, digits, batch_size=1)))
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_check_can_stop(family: Family, digits: Examples) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(merge_fisher(family, draws_of(family, digits), check=stop))


def test_an_expert_with_nan_is_named(family: Family, digits: Examples) -> None:
    parent = family.parents[1]
    weights = load_tensors(parent.path)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    write_artifact(parent.path, weights, parent.record)
    with pytest.raises(NumericsError, match=r"ft_2of2\.safetensors: 'conv_in\.weight'"):
        finish(merge_fisher(family, draws_of(family, digits)))


def test_an_expert_whose_gradients_overflow_is_named(family: Family, digits: Examples) -> None:
    parent = family.parents[1]
    weights = load_tensors(parent.path)
    weights["conv_in.weight"] *= 1e37
    write_artifact(parent.path, weights, parent.record)
    with pytest.raises(NumericsError, match=r"ft_2of2\.safetensors: gradients"):
        finish(merge_fisher(family, draws_of(family, digits)))


def test_a_text_conditional_model_merges_on_latents_and_captions(
    pipelines: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    model = import_model(str(pipelines("sd")))
    write_artifact(tmp_path / "base.safetensors", model.weights, base_record(model))
    family = write_experts(tmp_path)
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"image {i}"}) for i in range(10)]
    (image_folder / "metadata.jsonl").write_text("\n".join(lines))
    images = DataConfig(source=str(image_folder))
    examples = open_examples(images, open_companions(family.base_record), split="train")
    merged = finish(merge_fisher(family, draws_of(family, examples, num=3, batch_size=2))).weights
    mean = dict.fromkeys(merged, 0.0)
    for parent in family.parents:
        for name, tensor in load_tensors(parent.path).items():
            mean[name] = mean[name] + tensor / 2
    assert merged.keys() == mean.keys()
    assert any(
        (merged[name] - mean[name]).abs().max() > 0.01 for name in merged if "attn2.to_v" in name
    )


def test_draws_lie_in_their_range_evenly_and_more_of_them_only_add(
    family: Family, digits: Examples
) -> None:
    few, many = draws_of(family, digits, num=20), draws_of(family, digits, num=1500)
    span = TimestepRange(25, 75)
    assert torch.equal(few.timesteps(span), many.timesteps(span)[:20])
    assert torch.equal(few.images(), many.images()[:20])
    counts = torch.bincount(many.timesteps(span), minlength=75)
    assert counts[:25].sum() == 0
    assert counts[25:].min() >= 28
    assert counts[25:].max() <= 32
    assert set(torch.bincount(many.images(), minlength=len(digits)).tolist()) == {1, 2}
