"""RegMean against Eq. 1-2 written out, on networks small enough for plain loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_expert
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig
from deme_cli.diffusion.checkpoints import base_record, import_model
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import build_network, load_denoiser
from deme_cli.diffusion.projection import attach_projections
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.merging.lineage import Family, Parent, open_family, open_parents
from deme_cli.merging.methods.data_driven import write_merged_weights
from deme_cli.merging.methods.range_draws import RangeDraws
from deme_cli.merging.methods.regmean import (
    Layer,
    LayerSums,
    group_layers,
    input_rows,
    merge_regmean,
    regressed_layers,
)
from deme_cli.merging.task_vectors import write_task_vector
from deme_cli.training.materials import open_examples

CPU = torch.device("cpu")


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """What each output of a layer is a linear map of, one row per output."""
    if isinstance(module, nn.Linear):
        return inputs.flatten(0, -2)
    columns = functional.unfold(
        inputs, module.kernel_size, padding=module.padding, stride=module.stride
    )
    return columns.transpose(1, 2).flatten(0, 1)


def inputs_by_layer(parent: Parent, draws: RangeDraws, drawn: Callable) -> dict[str, np.ndarray]:
    """X_i (n, d) in float64 of every layer of one expert on its own range."""
    network, seen = load_denoiser(parent.path).network, {}
    x_t, _, t = map(torch.cat, zip(*drawn(draws, parent.record.timesteps), strict=True))
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.update(
                    {name: patches(module, inputs[0]).double().numpy()}
                )
            )
    with torch.no_grad():
        network(x_t, t)
    return seen


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_every_layer_solves_the_published_equation(
    family: Family, draws: RangeDraws, drawn: Callable, alpha: float
) -> None:
    *_, found = merge_regmean(family, draws, alpha=alpha)
    merged = dict(found.weights)
    experts = [load_tensors(parent.path) for parent in family.parents]
    inputs = [inputs_by_layer(parent, draws, drawn) for parent in family.parents]
    assert len(inputs[0]) > 20
    for name in inputs[0]:
        total, moment = 0, 0
        for expert, seen in zip(experts, inputs, strict=True):
            gram = seen[name].T @ seen[name]
            gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            weight = expert[f"{name}.weight"].flatten(1).double().numpy().T
            total, moment = total + gram, moment + gram @ weight
        expected = np.linalg.solve(total, moment).T.ravel()
        found = merged.pop(f"{name}.weight").flatten().numpy()
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
    assert merged, "biases and norms are left"
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (experts[0][name] + experts[1][name]) / 2)


def test_of_one_layer_it_has_the_least_squared_distance_to_all_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 7, generator=generator) * scale for scale in (1.0, 3.0)]
    weights = [torch.randn(5, 7, generator=generator) for _ in inputs]
    average = sum(weights) / 2
    sums = LayerSums(Layer("layer", 7, 5), 1.0, CPU)
    for rows, weight in zip(inputs, weights, strict=True):
        sums.begin(0.5, weight, average)
        for part in rows.split(16):
            sums.add(part)
    outputs = [rows @ weight.T for rows, weight in zip(inputs, weights, strict=True)]
    expected, *_ = np.linalg.lstsq(torch.cat(inputs).double(), torch.cat(outputs).double())
    np.testing.assert_allclose(average.T + sums.solve(), expected, atol=1e-4)


def test_weights_that_no_output_shows_are_averages_by_the_energy_of_their_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    weights = torch.randn(2, 4, 13, generator=generator)
    average, hidden = weights.mean(0), basis[5:].numpy()
    sums, energy, moment = LayerSums(Layer("layer", 13, 4), 1.0, CPU), 0, 0
    for weight, scale in zip(weights, (1.0, 2.0), strict=True):
        seen = scale * torch.randn(500, 5, generator=generator) @ basis[:5]  # 5 of 12 directions
        sums.begin(0.5, weight, average)
        sums.add(functional.pad(seen, (0, 1)))  # and an input that is always 0
        diagonal = np.diag(seen.square().sum(0).numpy())
        energy, moment = energy + diagonal, moment + diagonal @ weight[:, :12].numpy().T
    found = average.T + sums.solve()
    expected = hidden @ moment  # of (sum_i D_i) W = sum_i D_i W_i, what lies outside of the inputs
    np.testing.assert_allclose(hidden @ energy @ found[:12].numpy(), expected, atol=0.01 * 500)
    assert torch.equal(found[12], average[:, 12])


def test_a_layer_without_inputs_keeps_the_average() -> None:
    sums = LayerSums(Layer("layer", 3, 2), 0.9, CPU)
    sums.begin(1.0, torch.ones(2, 3), torch.zeros(2, 3))
    assert (sums.solve() == 0).all()


def test_rows_of_a_convolution_are_its_patches_one_per_output() -> None:
    torch.manual_seed(0)
    layer, image = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), torch.randn(2, 2, 5, 5)
    rows = torch.cat(list(input_rows(layer, image)))
    padded = functional.pad(image, (1, 1, 1, 1))
    expected = [
        padded[batch, :, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3].flatten()
        for batch in range(2)
        for y in range(3)
        for x in range(3)
    ]
    assert torch.equal(rows, torch.stack(expected))
    outputs = rows @ layer.weight.flatten(1).T
    torch.testing.assert_close(outputs, layer(image).permute(0, 2, 3, 1).flatten(0, 2))


def test_large_inputs_are_unfolded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, image = nn.Conv2d(2, 3, 3, padding=1), torch.randn(5, 2, 4, 4)
    whole = torch.cat(list(input_rows(layer, image)))
    monkeypatch.setattr("deme_cli.merging.methods.regmean._PATCHES", 2 * 9 * 32)
    parts = list(input_rows(layer, image))
    assert [len(part) for part in parts] == [32, 32, 16]
    assert torch.equal(torch.cat(parts), whole)


def test_a_convolution_of_one_pixel_and_a_linear_layer_are_the_same() -> None:
    image = torch.randn(2, 6, 4, 4)
    tokens = image.permute(0, 2, 3, 1)
    rows = [
        torch.cat(list(input_rows(*pair)))
        for pair in ((nn.Conv2d(6, 3, 1), image), (nn.Linear(6, 3), tokens))
    ]
    assert torch.equal(*rows)


def test_groups_and_batches_do_not_change_the_result(family: Family, draws: RangeDraws) -> None:
    *_, whole = merge_regmean(family, draws)
    *_, parts = merge_regmean(family, replace(draws, batch_size=6), memory_bytes=1_000_000)
    assert whole.details["passes"] == 1 < parts.details["passes"] < parts.details["layers"]
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, atol=1e-5, rtol=1e-4)


def test_groups_fit_into_memory_and_a_larger_layer_stands_alone(family: Family) -> None:
    layers = regressed_layers(family)
    groups = group_layers(layers, 100_000)
    assert [layer for group in groups for layer in group] == layers
    for group in groups:
        assert len(group) == 1 or sum(layer.num_bytes for layer in group) <= 100_000
    assert any(group[0].num_bytes > 100_000 for group in groups)


def test_task_vectors_merge_as_their_experts_do(
    family: Family, draws: RangeDraws, tmp_path: Path
) -> None:
    vectors = []
    for index in range(2):
        vectors.append(tmp_path / f"tv_{index}.safetensors")
        write_task_vector(family, index, {}, vectors[-1])
    others = open_family(family.base.path, open_parents(vectors, "task-vector"))
    *_, expected = merge_regmean(family, draws)
    *_, merged = merge_regmean(others, draws)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(merged.weights[name], tensor, atol=1e-5, rtol=1e-4)


def test_block_projections_are_averaged_and_in_force(family: Family, draws: RangeDraws) -> None:
    for seed, parent in enumerate(family.parents):
        torch.manual_seed(seed)
        network = build_network(parent.record.model_config)
        attach_projections(network, "block")
        weights = network.state_dict()
        projections = [name for name in weights if name.startswith("channel_projection.")]
        for name in projections:
            weights[name] = weights[name] + 0.1 * torch.randn(weights[name].shape)
        write_artifact(parent.path, weights, replace(parent.record, projection="block"))
    paths = [parent.path for parent in family.parents]
    family = open_family(family.base.path, open_parents(paths, "expert"))
    *_, merged = merge_regmean(family, draws)
    experts = [load_tensors(parent.path) for parent in family.parents]
    assert projections
    assert merged.weights.keys() == experts[0].keys()
    for name in projections:
        torch.testing.assert_close(merged.weights[name], (experts[0][name] + experts[1][name]) / 2)


def test_a_text_conditional_model_merges_on_latents_and_captions_and_is_written(
    pipelines: Callable[..., Path], image_folder: Path, tmp_path: Path
) -> None:
    model = import_model(str(pipelines("sd")))
    base = tmp_path / "base.safetensors"
    weights = {name: tensor.half() for name, tensor in model.weights.items()}
    write_artifact(base, weights, base_record(model))
    paths = [tmp_path / f"ft_{index}of2.safetensors" for index in (1, 2)]
    for index, path in enumerate(paths, start=1):
        write_tiny_expert(path, base, index=index, of=2)
        halve(path)
    family = open_family(base, open_parents(paths, "expert"))
    images = DataConfig(source=str(caption(image_folder)))
    examples = open_examples(images, open_companions(family.base_record), split="train")
    schedule = read_schedule(family.base_record.scheduler_config)
    *_, merged = merge_regmean(family, RangeDraws(examples, schedule, 3, batch_size=2, seed=3))
    assert {tensor.dtype for tensor in merged.weights.values()} == {torch.float16}
    output = tmp_path / "merged.safetensors"
    write_merged_weights(
        family, merged.weights, output, coefficients=[1, 1], method="regmean", settings={"num": 3}
    )
    record = read_record(output, "merged")
    assert (record.method, record.settings) == ("regmean", {"num": 3})
    assert [parent["range"] for parent in record.parents] == [[0, 500], [500, 1000]]
    assert load_denoiser(output).network.config.cross_attention_dim == 16


def halve(path: Path) -> None:
    """Write an artifact again in float16."""
    weights = {name: tensor.half() for name, tensor in load_tensors(path).items()}
    write_artifact(path, weights, read_record(path))


def caption(folder: Path) -> Path:
    """The folder, with a caption for each image."""
    lines = [
        json.dumps({"file_name": image.name, "text": f"image {image.stem}"})
        for image in sorted(folder.glob("*.png"))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
