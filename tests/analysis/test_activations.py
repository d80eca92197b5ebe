"""What finetuning does to features: as a plain loop finds it, and in cases with known answers."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deme_cli.analysis.activations.block_change import (
    BlockChange,
    block_change,
    block_sums,
    fit_map,
)
from deme_cli.analysis.activations.features import as_places, listening
from deme_cli.analysis.activations.found import ActivationChanges
from deme_cli.analysis.activations.measure import (
    ActivationAnalysis,
    _draws,
    measure_activations,
    projection_distances,
    require_block,
    require_finite,
)
from deme_cli.analysis.activations.picture import short_name
from deme_cli.analysis.activations.random_change import randomly_changed
from deme_cli.analysis.unfinished import Step
from deme_cli.analysis_config import ActivationConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.backbones.backbone import Site
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.diffusion.projection import PREFIX, attach_projections, sites
from deme_cli.errors import ArtifactError, ConfigError, NumericsError, Stopped
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import PixelExamples

CONFIG = ActivationConfig(num=12, batch_size=4, controls=0)
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


@pytest.fixture
def analysis(finished_run: Path, tmp_path: Path) -> ActivationAnalysis:
    base, expert = (
        load_denoiser(finished_run / f"{name}.safetensors") for name in ("base", "ft_2of4")
    )
    examples = PixelExamples(open_images("digits", shape=base.sample_shape, split="held-out"))
    return ActivationAnalysis(
        base, expert, ("base", "ft_2of4"), examples, CONFIG, TimestepRange(25, 50), "held-out",
        tmp_path / "activations.json",
    )  # fmt: skip


def finish(analysis: ActivationAnalysis, **options) -> ActivationChanges:
    *_, last = measure_activations(analysis, **options)
    assert isinstance(last, ActivationChanges)
    return last


def projected(denoiser: Denoiser) -> Denoiser:
    """The same network with block projections away from the identity."""
    network = denoiser.network
    attach_projections(network, "block")
    generator = torch.Generator().manual_seed(0)
    for projection in network.get_submodule(PREFIX).values():
        projection.weight.data += 0.2 * torch.randn(projection.weight.shape, generator=generator)
    return denoiser


def features(analysis: ActivationAnalysis, denoiser: Denoiser) -> dict[str, np.ndarray]:
    """What is inside the network after each block, in one batch, projected by hand: (B, C, P)."""
    draws, found, handles = _draws(analysis), {}, []
    own = dict(denoiser.network.named_parameters())
    module_of = denoiser.network.get_submodule
    for name in BLOCKS:
        module = module_of(name)
        hooks = list(module._forward_hooks.values())
        module._forward_hooks.clear()  # without its projection, which is applied here
        weight = own.get(f"{PREFIX}.{name.replace('.', '_')}.weight")

        def keep(module, inputs, output, name=name, weight=weight):
            h = output[0] if isinstance(output, tuple) else output
            h = h if weight is None else torch.einsum("dc,bchw->bdhw", weight, h)
            found[name] = h.flatten(2).double().numpy()
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append((module, module.register_forward_hook(keep), hooks))
    x0, _ = analysis.examples.draw(draws.images.tolist(), flip=None, generator=None)
    x_t = denoiser.schedule.add_noise(x0, draws.noise(torch.arange(len(draws.t))), draws.t)
    with torch.no_grad():
        predict(denoiser.network, x_t, draws.t)
    for module, handle, hooks in handles:
        handle.remove()
        for hook in hooks:
            module.register_forward_hook(hook)
    return found


def by_loop(base: np.ndarray, delta: np.ndarray) -> dict[str, float]:
    """The two-way analysis of variance, draw by draw and cell by cell."""
    num, C, P = delta.shape
    squares = np.zeros(4)
    for one in delta:
        mu = one.mean()
        alpha, beta = one.mean(1) - mu, one.mean(0) - mu
        for c in range(C):
            for p in range(P):
                eps = one[c, p] - mu - alpha[c] - beta[p]
                squares += np.array([mu**2, alpha[c] ** 2, beta[p] ** 2, eps**2]) / num
    noise = squares[3] / (C - 1) / (P - 1)
    channel, place = (squares[1] / (C - 1) - noise) / P, (squares[2] / (P - 1) - noise) / C
    variance = base.var()
    return {
        "channel": channel / variance, "place": place / variance, "rest": noise / variance,
        "shift": squares[0] / squares.sum(), "size": np.sqrt((delta**2).mean() / variance),
    }  # fmt: skip


@pytest.mark.parametrize("with_projections", [False, True])
def test_blocks_are_told_as_a_plain_loop_tells_them(
    analysis: ActivationAnalysis, with_projections: bool
) -> None:
    if with_projections:
        projected(analysis.expert)
    found = finish(analysis)
    base, expert = (features(analysis, one) for one in (analysis.base, analysis.expert))
    assert [block.name for block in found.blocks] == BLOCKS
    for block in found.blocks:
        F, delta = base[block.name], expert[block.name] - base[block.name]
        expected = by_loop(F, delta)
        for part in ("channel", "place", "rest"):
            near = pytest.approx(expected[part], rel=1e-3, abs=1e-7)
            assert getattr(block.components, part) == near
        assert (block.size, block.shift) == pytest.approx(
            (expected["size"], expected["shift"]), rel=1e-3
        )
        channel, place = block.differences
        assert np.allclose(channel, delta.mean((0, 2)) / F.std(), rtol=1e-3, atol=1e-6)
        assert np.allclose(place, delta.mean((0, 1)) / F.std(), rtol=1e-3, atol=1e-6)
        X, Y = (np.moveaxis(one, 1, 0) for one in (F, delta))  # (C, B, P)
        fit, test = (np.s_[:, part] for part in (slice(6), slice(6, 12)))
        C = len(X)
        V = np.linalg.lstsq(X[fit].reshape(C, -1).T, Y[fit].reshape(C, -1).T, rcond=None)[0].T
        residual = Y[test].reshape(C, -1) - V @ X[test].reshape(C, -1)
        near = pytest.approx(1 - (residual**2).sum() / (Y[test] ** 2).sum(), abs=2e-3)
        assert block.explained.channel_map == near
        gain = (X[fit] * Y[fit]).sum((0, 1)) / (X[fit] ** 2).sum((0, 1))
        residual = Y[test] - gain * X[test]
        near = pytest.approx(1 - (residual**2).sum() / (Y[test] ** 2).sum(), abs=2e-3)
        assert block.explained.place_gain == near
        assert (block.projection is not None) == with_projections
    assert found.drawn.size == max(block.size for block in found.blocks)


def told(delta: Tensor) -> BlockChange:
    """What is said of a given Delta (n, C, P): half of it fits, half tests."""
    base = torch.randn(delta.shape, generator=torch.Generator().manual_seed(9)).double()
    half = len(delta) // 2
    sums = block_sums(base[:half], delta[:half])
    fitted = torch.from_numpy(fit_map(sums.pop("gram").numpy(), sums.pop("cross").numpy()))
    for key, value in block_sums(base[half:], delta[half:], fitted).items():
        sums[key] = sums.get(key, 0) + value
    return block_change("x", {k: v.numpy() for k, v in sums.items()}, len(delta), (1, 1))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def test_pure_effects_have_all_of_the_change() -> None:
    channel = told(normal(20, 6, 1).expand(20, 6, 25))
    assert channel.shares.channel == pytest.approx(1)
    assert channel.fixed[0] < 0.3  # drawn anew for every draw
    place = told(normal(1, 1, 25).expand(20, 6, 25))
    assert place.shares.place == pytest.approx(1)
    assert place.fixed[1] == pytest.approx(1)
    assert told(torch.ones(4, 6, 25).double()).shift == 1


@pytest.mark.parametrize(("C", "P"), [(40, 6), (6, 40)])
def test_components_of_variance_do_not_depend_on_how_many_are_averaged(C: int, P: int) -> None:
    n = 2000
    noise = told(3 * normal(n, C, P))
    assert noise.spread[0] / noise.spread[1] == pytest.approx((C / P) ** 0.5, rel=0.1)
    assert noise.averaging_ratio == (C / P) ** 0.5
    assert noise.shares.rest > 0.99
    mixed = told(normal(n, C, 1) + 2 * normal(n, 1, P) + 3 * normal(n, C, P))
    components = mixed.components
    assert (components.channel, components.place, components.rest) == pytest.approx(
        (1, 4, 9), rel=0.05
    )
    assert mixed.shares.place == pytest.approx(4 / 14, rel=0.05)


def test_half_of_a_fixed_and_a_changing_effect_is_fixed() -> None:
    delta = normal(1, 200, 1) + normal(300, 200, 1) + normal(300, 200, 4)
    assert told(delta).fixed[0] == pytest.approx(0.5, abs=0.08)


def test_least_squares_recover_the_map_that_made_the_change() -> None:
    base = normal(30, 5, 40)
    base[:, 2] *= 1e3  # a channel of another scale
    V = normal(5, 5)
    sums = block_sums(base, V @ base)
    gram, cross = sums["gram"].numpy(), sums["cross"].numpy()
    assert np.allclose(fit_map(gram, cross), V, atol=1e-9)
    gram[4], gram[:, 4], cross[:, 4] = 0, 0, 0  # a dead channel takes no part
    assert np.isfinite(fit_map(gram, cross)).all()
    tested = block_sums(base, V @ base + 0, V)["residual"]
    assert tested[0] / tested[1] < 1e-20


def test_distances_from_the_identity_are_those_worked_out_by_hand(
    analysis: ActivationAnalysis,
) -> None:
    network = analysis.expert.network
    assert projection_distances(network) == {}
    attach_projections(network, "block")
    own = network.get_submodule(PREFIX)["mid_block"].weight
    own.data[0, 1], own.data[2, 2] = 3.0, 5.0  # W - I has the singular values 3 and 4
    found = projection_distances(network)
    assert list(found) == BLOCKS
    assert (found["mid_block"].relative, found["mid_block"].largest) == pytest.approx(
        (5 / own.shape[0] ** 0.5, 4)
    )
    assert (found["up_blocks.1"].relative, found["up_blocks.1"].largest) == (0, 0)


def test_tokens_are_places_and_lie_in_the_grid_of_x_t() -> None:
    tokens = normal(2, 8, 3)
    places, grid = as_places(tokens, (4, 16, 32))
    assert torch.equal(places, tokens.transpose(1, 2))
    assert grid == (2, 4)
    assert as_places(normal(2, 7, 3), (4, 16, 16))[1] == (1, 7)
    assert as_places(normal(2, 3, 4, 5), (4, 16, 16))[1] == (4, 5)


def test_of_several_outputs_the_image_tokens_are_taken() -> None:
    class Block(torch.nn.Module):
        def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return text + 1, image + 2

    network, seen = torch.nn.ModuleDict({"block": Block()}), {}
    with listening(network, [Site("block", 4, output=1)], seen.__setitem__):
        network["block"](torch.zeros(1, 3, 4), torch.zeros(1, 9, 4))
    assert torch.equal(seen["block"], torch.full((1, 9, 4), 2.0))


def test_hooks_are_gone_afterwards(analysis: ActivationAnalysis) -> None:
    network = analysis.base.network
    seen: list[str] = []
    with listening(network, sites(network, "block"), lambda path, _: seen.append(path)):
        predict(network, torch.zeros(1, 1, 8, 8), torch.tensor([3]))
    assert seen == BLOCKS
    assert not any(module._forward_hooks for module in network.modules())


def test_the_batch_size_changes_rounding_alone(analysis: ActivationAnalysis) -> None:
    analysis = replace(analysis, config=replace(CONFIG, controls=1))
    fives = replace(analysis, config=replace(analysis.config, batch_size=5))  # the half ends one
    found, other = finish(analysis), finish(fives, force=True)
    for one, two in ((found.summary, other.summary),
                     (found.control_summaries[0], other.control_summaries[0])):  # fmt: skip
        for key in ("shares", "explained", "fixed"):
            assert list(one[key].values()) == pytest.approx(list(two[key].values()), abs=1e-4)


def test_a_control_is_told_as_an_expert_is_and_changes_nothing_else(
    analysis: ActivationAnalysis,
) -> None:
    alone = finish(analysis)
    assert (alone.controls, alone.control_means()) == ([], [])
    found = finish(replace(analysis, config=replace(CONFIG, controls=2)))  # goes on after 12
    assert [block.row() for block in found.blocks] == [block.row() for block in alone.blocks]
    network = randomly_changed(analysis.base.network, analysis.expert.network, seed=0, k=2)
    second = replace(analysis, expert=replace(analysis.expert, network=network))
    expected = finish(second, force=True)
    assert [b.row() for b in found.controls[1]] == [b.row() for b in expected.blocks]
    shares = [blocks[2].shares.channel for blocks in found.controls]
    assert found.rows()[2]["controls"]["shares"]["channel"] == sum(shares) / 2
    assert shares[0] != shares[1]


@pytest.mark.parametrize("batches", [1, 3, 4, 6])  # 4: between the expert and its control
def test_a_resumed_analysis_equals_an_uninterrupted_one(
    analysis: ActivationAnalysis, tmp_path: Path, batches: int
) -> None:
    analysis = replace(analysis, config=replace(CONFIG, controls=1))
    whole = finish(replace(analysis, output=tmp_path / "whole.json"))
    steps = measure_activations(analysis)
    done = 0
    for _ in range(batches + 1):
        done = next(steps).done
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=f"after {done} of 24 comparisons"):
        next(steps)
    first, *_, last = measure_activations(analysis)
    assert first == Step(done, f"continuing after {done} of 24 comparisons")
    assert last.rows() == whole.rows()
    assert last.control_summaries == whole.control_summaries
    assert np.array_equal(last.drawn.place_change, whole.drawn.place_change)
    other = replace(analysis, span=TimestepRange(0, 25))
    assert "had another range" in next(measure_activations(other)).note


def test_what_cannot_be_compared_is_an_error(analysis: ActivationAnalysis) -> None:
    same = replace(analysis, expert=analysis.base)
    with pytest.raises(ArtifactError, match="ft_2of4: its features are those of base after every"):
        finish(same)
    with pytest.raises(ConfigError, match="no such block in base; did you mean 'mid_block'"):
        require_block(analysis.base.network, "midblock", "base")
    next(analysis.expert.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="ft_2of4: the features after down_blocks"):
        finish(analysis, force=True)
    sums = {"base_moments": torch.ones(2), "squares": torch.tensor([1, float("inf")])}
    with pytest.raises(NumericsError, match=r"large as those of ft_2of4; leave .* --controls 0"):
        require_finite(sums, "mid_block", analysis.names, 1)


def test_blocks_that_did_not_change_are_left_out_of_the_means(
    analysis: ActivationAnalysis,
) -> None:
    own, base = analysis.expert.network, analysis.base.network
    weights = base.state_dict()
    weights["up_blocks.1.resnets.0.conv1.weight"] = own.state_dict()[
        "up_blocks.1.resnets.0.conv1.weight"
    ]
    own.load_state_dict(weights)
    found = finish(analysis)
    assert [block.size > 0 for block in found.blocks] == [False] * 4 + [True]
    assert found.summary["shares"]["channel"] == found.blocks[4].shares.channel


def test_blocks_have_short_names() -> None:
    names = ["down_blocks.0", "mid_block", "transformer_blocks.12", "single_transformer_blocks.3"]
    assert [short_name(name) for name in names] == ["down 0", "mid", "12", "single 3"]
