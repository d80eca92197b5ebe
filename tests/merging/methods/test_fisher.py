"""Fisher-weighted merging against Eq. 5 with gradients of one example at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_expert
from torch import Tensor

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.config import DataConfig
from deme_cli.diffusion.checkpoints import base_record, import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.merging.lineage import Family, Parent, open_family, open_parents
from deme_cli.merging.methods.fisher import FLOOR, merge_fisher
from deme_cli.merging.methods.range_draws import RangeDraws
from deme_cli.training.materials import open_examples


def fisher_of(parent: Parent, draws: RangeDraws, drawn: Callable) -> dict[str, Tensor]:
    """The mean of (d loss / d theta)^2, by loss.backward() of one image after another."""
    network = load_denoiser(parent.path).network.requires_grad_(True)
    fisher = {name: torch.zeros(value.shape) for name, value in network.named_parameters()}
    for x_t, eps, t in drawn(draws, parent.record.timesteps):
        network.zero_grad()
        (network(x_t, t).sample - eps).square().mean().backward()
        for name, parameter in network.named_parameters():
            fisher[name] += parameter.grad.square() / draws.num
    return fisher


@pytest.mark.parametrize("normalize", [True, False])
def test_every_parameter_is_the_published_weighted_mean(
    family: Family, draws: RangeDraws, drawn: Callable, normalize: bool
) -> None:
    coefficients = [1.0, 3.0]
    *_, merged = merge_fisher(family, draws, normalize=normalize, coefficients=coefficients)
    fishers = [fisher_of(parent, draws, drawn) for parent in family.parents]
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
    family: Family, draws: RangeDraws
) -> None:
    *_, merged = merge_fisher(family, draws, coefficients=[1, 3])
    first, second = (load_tensors(parent.path) for parent in family.parents)
    keys = [name for name in first if name.endswith("to_k.bias")]  # softmax does not see them
    assert keys
    for name in keys:
        expected = 0.25 * first[name] + 0.75 * second[name]
        torch.testing.assert_close(merged.weights[name], expected, atol=1e-4, rtol=1e-3)


def test_batches_do_not_change_the_result(family: Family, draws: RangeDraws) -> None:
    *_, whole = merge_fisher(family, draws)
    *_, parts = merge_fisher(family, replace(draws, batch_size=1))
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_text_conditional_model_merges_on_latents_and_captions(
    pipelines: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    model = import_model(str(pipelines("sd")))
    base = tmp_path / "base.safetensors"
    write_artifact(base, model.weights, base_record(model))
    paths = [tmp_path / f"ft_{index}of2.safetensors" for index in (1, 2)]
    for index, path in enumerate(paths, start=1):
        write_tiny_expert(path, base, index=index, of=2, scale=0.05)
    family = open_family(base, open_parents(paths, "expert"))
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"image {i}"}) for i in range(10)]
    (image_folder / "metadata.jsonl").write_text("\n".join(lines))
    images = DataConfig(source=str(image_folder))
    examples = open_examples(images, open_companions(family.base_record), split="train")
    schedule = read_schedule(family.base_record.scheduler_config)
    *_, merged = merge_fisher(family, RangeDraws(examples, schedule, 3, batch_size=2, seed=3))
    first, second = map(load_tensors, paths)
    assert merged.weights.keys() == first.keys()
    assert any(
        (merged.weights[name] - (first[name] + second[name]) / 2).abs().max() > 0.01
        for name in first
        if "attn2.to_v" in name
    )
