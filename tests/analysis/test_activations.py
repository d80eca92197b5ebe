"""What finetuning does to features: as a plain loop finds it, and in cases with known answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deme_cli.analysis.activations import (
    analyze_activations,
    as_places,
    block_change,
    block_sums,
    listening,
    randomly_changed,
)
from deme_cli.analysis.draws import open_models, spread_draws
from deme_cli.analysis.result import Analysis
from deme_cli.analysis.settings import ActivationConfig
from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import DataConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.diffusion.projection import PREFIX, Site, attach_projections, sites
from deme_cli.errors import ArtifactError, NumericsError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import PixelExamples

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
BASE, EXPERT = Path("base.safetensors"), Path("ft_2of4.safetensors")


def settings(**options: int) -> ActivationConfig:
    return ActivationConfig(**{"num": 12, "batch_size": 4, "controls": 0, **options})


def analyze(expert: Path = EXPERT, **options: Any) -> Analysis:
    usual = {"settings": settings(), "images": DataConfig(source="digits"), "force": True}
    return analyze_activations(expert, **{**usual, **options})


def write_projections(scale: float) -> None:
    """Give the expert block projections away from the identity."""
    network = load_denoiser(EXPERT).network
    attach_projections(network, "block")
    generator = torch.Generator().manual_seed(0)
    for projection in network.get_submodule(PREFIX).values():
        shape = projection.weight.shape
        projection.weight.data += scale * torch.randn(shape, generator=generator)
    write_artifact(EXPERT, network.state_dict(), read_record(EXPERT, "expert"))


def features(path: Path) -> dict[str, np.ndarray]:
    """What is inside the network after each block, in one batch, projected by hand: (B, C, P)."""
    denoiser, weights = load_denoiser(path), load_tensors(path)
    network = load_denoiser(BASE).network  # without hooks of projections
    network.load_state_dict({n: w for n, w in weights.items() if not n.startswith(PREFIX)})
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape, split="held-out"))
    draws = spread_draws(examples, denoiser.schedule, [TimestepRange(25, 50)], settings())
    found: dict[str, np.ndarray] = {}
    for name in BLOCKS:
        weight = weights.get(f"{PREFIX}.{name.replace('.', '_')}.weight")

        def keep(module, inputs, output, name=name, weight=weight):
            h = output[0] if isinstance(output, tuple) else output
            h = h if weight is None else torch.einsum("dc,bchw->bdhw", weight, h)
            found[name] = h.flatten(2).double().numpy()
            return (h, *output[1:]) if isinstance(output, tuple) else h

        network.get_submodule(name).register_forward_hook(keep)
    x0, _ = examples.draw(draws.images.tolist(), flip=None, generator=None)
    x_t = denoiser.schedule.add_noise(x0, draws.noise(torch.arange(len(draws.t))), draws.t)
    with torch.no_grad():
        predict(network, x_t, draws.t)
    return found


def by_loop(base: np.ndarray, delta: np.ndarray) -> dict[str, float]:
    """The two-way analysis of variance, draw by draw and cell by cell."""
    num, C, P = delta.shape
    squares = np.zeros(3)
    for one in delta:
        mu = one.mean()
        alpha, beta = one.mean(1) - mu, one.mean(0) - mu
        for c in range(C):
            for p in range(P):
                eps = one[c, p] - mu - alpha[c] - beta[p]
                squares += np.array([alpha[c] ** 2, beta[p] ** 2, eps**2]) / num
    noise = squares[2] / (C - 1) / (P - 1)
    channel, place = (squares[0] / (C - 1) - noise) / P, (squares[1] / (P - 1) - noise) / C
    return dict(zip(("channel", "place", "rest"), (channel, place, noise), strict=True))


@pytest.mark.parametrize("with_projections", [False, True])
def test_blocks_are_told_as_a_plain_loop_tells_them(
    run_folder: Path, resumed: Any, with_projections: bool
) -> None:
    if with_projections:
        write_projections(0.2)
    controls = 0 if with_projections else 2
    call = partial(analyze, settings=settings(controls=controls), force=False)
    document = (resumed(call, 12) if controls else call()).document
    base, expert = (features(path) for path in (BASE, EXPERT))
    assert [row["name"] for row in document["blocks"]] == BLOCKS
    for row in document["blocks"]:
        F, delta = base[row["name"]], expert[row["name"]] - base[row["name"]]
        for part, expected in by_loop(F, delta).items():
            near = pytest.approx(expected / F.var(), rel=1e-3, abs=1e-7)
            assert row["components"][part] == near
        assert row["size"] == pytest.approx(np.sqrt((delta**2).mean() / F.var()), rel=1e-3)
        for part, axes in (("channel", (0, 2)), ("place", (0, 1))):
            quantiles = np.quantile(delta.mean(axes) / F.std(), document["quantiles"])
            assert row["difference"][part] == pytest.approx(quantiles, rel=1e-3, abs=1e-6)
    largest = max(document["blocks"], key=lambda row: row["size"])
    assert document["drawn"]["name"] == largest["name"]
    assert len(document["controls"]) == controls
    if controls:
        shares = [one["channel"] for one in document["controls"]]
        assert shares[0] != shares[1]
        means = [row["controls"]["channel"] for row in document["blocks"]]
        assert np.mean(means) == pytest.approx(np.mean(shares))
        low, high = (f"{100 * share:.0f} %" for share in sorted(shares))
        assert f"(random changes of this size: {low} to {high} in ch" in document["reading"]


def told(delta: Tensor) -> dict[str, Any]:
    """What is said of a given Delta (n, C, P)."""
    base = torch.randn(delta.shape, generator=torch.Generator().manual_seed(9)).double()
    sums = {f"x/{key}": value.numpy() for key, value in block_sums(base, delta).items()}
    return block_change("x", {**sums, "x/grid": np.array([1, 1])}, len(delta))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def test_pure_effects_have_all_of_the_change() -> None:
    assert told(normal(20, 6, 1).expand(20, 6, 25))["shares"]["channel"] == pytest.approx(1)
    assert told(normal(1, 1, 25).expand(20, 6, 25))["shares"]["place"] == pytest.approx(1)
    assert np.isnan(told(normal(20, 6, 1))["shares"]["rest"]), "one place tells nothing apart"


@pytest.mark.parametrize(("C", "P"), [(40, 6), (6, 40)])
def test_components_of_variance_do_not_depend_on_how_many_are_averaged(C: int, P: int) -> None:
    n = 2000
    assert told(3 * normal(n, C, P))["shares"]["rest"] > 0.99
    mixed = told(normal(n, C, 1) + 2 * normal(n, 1, P) + 3 * normal(n, C, P))
    assert list(mixed["components"].values()) == pytest.approx((1, 4, 9), rel=0.05)
    assert mixed["shares"]["place"] == pytest.approx(4 / 14, rel=0.05)


def test_tokens_are_places_and_of_several_outputs_the_image_is_taken() -> None:
    tokens = normal(2, 8, 3)
    places, grid = as_places(tokens, (4, 16, 32))
    assert torch.equal(places, tokens.transpose(1, 2))
    assert grid == (2, 4)
    assert as_places(normal(2, 7, 3), (4, 16, 16))[1] == (1, 7)
    assert as_places(normal(2, 3, 4, 5), (4, 16, 16))[1] == (4, 5)

    class Block(nn.Module):
        def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return text + 1, image + 2

    network, seen = nn.ModuleDict({"block": Block()}), {}
    with listening(network, [Site("block", 4, output=1)], seen.__setitem__):
        network["block"](torch.zeros(1, 3, 4), torch.zeros(1, 9, 4))
    assert torch.equal(seen["block"], torch.full((1, 9, 4), 2.0))
    assert not network["block"]._forward_hooks


def test_what_cannot_be_compared_is_an_error(
    run_folder: Path, write_changed: Callable[..., Path]
) -> None:
    bias = load_tensors(BASE)["conv_out.bias"] + 1
    record = read_record(EXPERT, "expert")
    same = load_tensors(BASE) | {"conv_out.bias": bias}  # after every block
    write_artifact(EXPERT, same, record)
    with pytest.raises(ArtifactError, match="ft_2of4: its features are those of base after every"):
        analyze()
    write_changed(str(EXPERT), str(EXPERT), 1e25)
    with pytest.raises(NumericsError, match="ft_2of4: the features after down_blocks"):
        analyze()


def changes(network: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    before = base.state_dict()
    return {name: tensor - before[name] for name, tensor in network.state_dict().items()}


def test_a_random_change_moves_every_tensor_as_far_as_the_expert(run_folder: Path) -> None:
    write_projections(0.2)
    base, expert = (
        one.network for one in open_models(list(map(str, (BASE, EXPERT))), pipeline=None)
    )
    first = changes(randomly_changed(base, expert, seed=0, k=1), base)
    for name, change in changes(expert, base).items():
        assert float(first[name].norm()) == pytest.approx(float(change.norm()), rel=1e-3, abs=1e-9)
    name = "conv_in.weight"
    again = copy.deepcopy(expert)
    again.state_dict()[name].mul_(1.1)
    after = changes(randomly_changed(base, again, seed=0, k=1), base)
    assert {other for other in first if not after[other].equal(first[other])} == {name}
    for seed, k in ((0, 2), (1, 1)):
        other = changes(randomly_changed(base, expert, seed=seed, k=k), base)
        cosine = torch.cosine_similarity(other[name].flatten(), first[name].flatten(), dim=0)
        assert abs(float(cosine)) < 0.5
    seen: list[str] = []
    with listening(expert, sites(expert, "block"), lambda path, _: seen.append(path)):
        predict(expert, torch.randn(1, 1, 8, 8), torch.tensor([3]))
    assert seen == BLOCKS
