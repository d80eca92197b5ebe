"""What finetuning does to features: as a plain loop finds it, and in cases with known answers."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deme_cli.analysis.activation_picture import short_name
from deme_cli.analysis.activations import analyze_activations, chance_interval, require_finite
from deme_cli.analysis.block_change import (
    as_places,
    block_change,
    block_sums,
    fit_map,
    listening,
    projection_distances,
    randomly_changed,
)
from deme_cli.analysis.draws import spread_draws
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
PROJECTION = f"{PREFIX}.mid_block.weight"
EXPERT = Path("ft_2of4.safetensors")


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
    network = load_denoiser(Path("base.safetensors")).network  # without hooks of projections
    network.load_state_dict({n: w for n, w in weights.items() if not n.startswith(PREFIX)})
    examples = PixelExamples(open_images("digits", shape=denoiser.sample_shape, split="held-out"))
    draws = spread_draws(
        examples, denoiser.schedule, [TimestepRange(25, 50)], 12, seed=0, purpose="activations",
        batch_size=4,
    )  # fmt: skip
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
    run_folder: Path, with_projections: bool
) -> None:
    if with_projections:
        write_projections(0.2)
    document = analyze().document
    base, expert = (features(path) for path in (Path("base.safetensors"), EXPERT))
    assert [row["name"] for row in document["blocks"]] == BLOCKS
    for row in document["blocks"]:
        F, delta = base[row["name"]], expert[row["name"]] - base[row["name"]]
        expected = by_loop(F, delta)
        for part in ("channel", "place", "rest"):
            near = pytest.approx(expected[part], rel=1e-3, abs=1e-7)
            assert row["components"][part] == near
        assert (row["size"], row["shift"]) == pytest.approx(
            (expected["size"], expected["shift"]), rel=1e-3
        )
        for part, axes in (("channel", (0, 2)), ("place", (0, 1))):
            quantiles = np.quantile(delta.mean(axes) / F.std(), document["quantiles"])
            near = pytest.approx(quantiles, rel=1e-3, abs=1e-6)
            assert row["difference"][part]["quantiles"] == near
        X, Y = (np.moveaxis(one, 1, 0) for one in (F, delta))  # (C, B, P)
        fit, test = (np.s_[:, part] for part in (slice(6), slice(6, 12)))
        C = len(X)
        V = np.linalg.lstsq(X[fit].reshape(C, -1).T, Y[fit].reshape(C, -1).T, rcond=None)[0].T
        residual = Y[test].reshape(C, -1) - V @ X[test].reshape(C, -1)
        near = pytest.approx(1 - (residual**2).sum() / (Y[test] ** 2).sum(), abs=2e-3)
        assert row["explained"]["channel_map"] == near
        gain = (X[fit] * Y[fit]).sum((0, 1)) / (X[fit] ** 2).sum((0, 1))
        residual = Y[test] - gain * X[test]
        near = pytest.approx(1 - (residual**2).sum() / (Y[test] ** 2).sum(), abs=2e-3)
        assert row["explained"]["place_gain"] == near
        assert (row["projection"] is not None) == with_projections
    largest = max(document["blocks"], key=lambda row: row["size"])
    assert document["drawn"]["name"] == largest["name"]


def told(delta: Tensor) -> dict[str, Any]:
    """What is said of a given Delta (n, C, P): half of it fits, half tests."""
    base = torch.randn(delta.shape, generator=torch.Generator().manual_seed(9)).double()
    half = len(delta) // 2
    sums = block_sums(base[:half], delta[:half])
    fitted = torch.from_numpy(fit_map(sums.pop("gram").numpy(), sums.pop("cross").numpy()))
    for key, value in block_sums(base[half:], delta[half:], fitted).items():
        sums[key] = sums.get(key, 0) + value
    return block_change("x", {k: v.numpy() for k, v in sums.items()}, len(delta), (1, 1))[0]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def test_pure_effects_have_all_of_the_change() -> None:
    channel = told(normal(20, 6, 1).expand(20, 6, 25))
    assert channel["shares"]["channel"] == pytest.approx(1)
    assert channel["fixed"]["channel"] < 0.3  # drawn anew for every draw
    place = told(normal(1, 1, 25).expand(20, 6, 25))
    assert place["shares"]["place"] == pytest.approx(1)
    assert place["fixed"]["place"] == pytest.approx(1)
    assert told(torch.ones(4, 6, 25).double())["shift"] == 1


@pytest.mark.parametrize(("C", "P"), [(40, 6), (6, 40)])
def test_components_of_variance_do_not_depend_on_how_many_are_averaged(C: int, P: int) -> None:
    n = 2000
    noise = told(3 * normal(n, C, P))
    spreads = [noise["difference"][part]["sd_per_draw"] for part in ("channel", "place")]
    assert spreads[0] / spreads[1] == pytest.approx((C / P) ** 0.5, rel=0.1)
    assert noise["averaging_ratio"] == (C / P) ** 0.5
    assert noise["shares"]["rest"] > 0.99
    mixed = told(normal(n, C, 1) + 2 * normal(n, 1, P) + 3 * normal(n, C, P))
    assert list(mixed["components"].values()) == pytest.approx((1, 4, 9), rel=0.05)
    assert mixed["shares"]["place"] == pytest.approx(4 / 14, rel=0.05)


def test_half_of_a_fixed_and_a_changing_effect_is_fixed() -> None:
    delta = normal(1, 200, 1) + normal(300, 200, 1) + normal(300, 200, 4)
    assert told(delta)["fixed"]["channel"] == pytest.approx(0.5, abs=0.08)


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


def test_distances_from_the_identity_are_those_worked_out_by_hand(finished_run: Path) -> None:
    network = load_denoiser(finished_run / EXPERT).network
    assert projection_distances(network) == {}
    attach_projections(network, "block")
    own = network.get_submodule(PREFIX)["mid_block"].weight
    own.data[0, 1], own.data[2, 2] = 3.0, 5.0  # W - I has the singular values 3 and 4
    found = projection_distances(network)
    assert list(found) == BLOCKS
    assert found["mid_block"] == pytest.approx({"relative": 5 / own.shape[0] ** 0.5, "largest": 4})
    assert found["up_blocks.1"] == {"relative": 0, "largest": 0}


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


def test_controls_the_batch_size_and_a_stop_leave_the_expert_alone(
    run_folder: Path, resumed: Any
) -> None:
    alone = analyze().document
    assert (alone["controls"], alone["blocks"][0]["controls"]) == ([], None)
    output, two = Path("two.json"), settings(controls=2)
    call = partial(analyze, settings=two, force=False, output=output)
    document = resumed(call, 20).document  # within the first control
    assert [{**row, "controls": None} for row in document["blocks"]] == alone["blocks"]
    base, expert = (load_denoiser(Path(p)) for p in ("base.safetensors", EXPERT))
    network = randomly_changed(base.network, expert.network, seed=0, k=2)
    write_artifact(Path("random.safetensors"), network.state_dict(), read_record(EXPERT, "expert"))
    second = analyze(Path("random.safetensors")).document["summary"]
    assert document["controls"][1] == second
    shares = [one["shares"]["channel"] for one in document["controls"]]
    means = [row["controls"]["shares"]["channel"] for row in document["blocks"]]
    assert np.mean(means) == pytest.approx(np.mean(shares))
    assert shares[0] != shares[1]
    fives = analyze(settings=settings(batch_size=5)).document["summary"]  # the half ends one
    for key in ("shares", "explained", "fixed"):
        near = pytest.approx(list(alone["summary"][key].values()), abs=1e-4)
        assert list(fives[key].values()) == near


def test_what_cannot_be_compared_is_an_error(run_folder: Path) -> None:
    weights, record = load_tensors(Path("base.safetensors")), read_record(EXPERT, "expert")
    one = {**weights, "extra": torch.zeros(1)}  # another fingerprint
    del one["extra"]
    last = "up_blocks.1.resnets.0.conv1.weight"
    one[last] = load_tensors(EXPERT)[last]
    write_artifact(EXPERT, one, record)
    document = analyze().document
    assert [row["size"] > 0 for row in document["blocks"]] == [False] * 4 + [True]
    own = document["blocks"][4]["shares"]["channel"]
    assert document["summary"]["shares"]["channel"] == own  # the others are left out of the means
    one[last] = weights[last]
    one["conv_out.bias"] = one["conv_out.bias"] + 1
    write_artifact(EXPERT, one, record)
    with pytest.raises(ArtifactError, match="ft_2of4: its features are those of base after every"):
        analyze()
    write_artifact(EXPERT, {name: 1e25 * theta for name, theta in one.items()}, record)
    with pytest.raises(NumericsError, match="ft_2of4: the features after down_blocks"):
        analyze()
    sums = {"base_moments": torch.ones(2), "squares": torch.tensor([1, float("inf")])}
    with pytest.raises(NumericsError, match=r"large as those of ft; leave .* --controls 0"):
        require_finite(sums, "mid_block", ("base", "ft"), 1)


def test_chance_is_taken_for_more_than_chance_one_time_in_twenty() -> None:
    draws = np.random.default_rng(0).normal(0.3, 0.05, (400, 5))
    beyond = []
    for own, *controls in draws.tolist():
        mean, reach = chance_interval(controls)
        beyond.append(abs(own - mean) > reach)
    assert np.mean(beyond) == pytest.approx(0.05, abs=0.03)
    assert np.isnan(chance_interval([0.3])[1])


def test_blocks_have_short_names() -> None:
    names = ["down_blocks.0", "mid_block", "transformer_blocks.12", "single_transformer_blocks.3"]
    assert [short_name(name) for name in names] == ["down 0", "mid", "12", "single 3"]


@pytest.fixture
def base(finished_run: Path) -> nn.Module:
    return load_denoiser(finished_run / "base.safetensors").network


@pytest.fixture
def expert(finished_run: Path) -> nn.Module:
    """With a projection away from the identity after its middle."""
    network = load_denoiser(finished_run / EXPERT).network
    attach_projections(network, "block")
    network.state_dict()[PROJECTION][0, 1] = 0.5
    return network


def changes(network: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    before = base.state_dict()
    return {
        name: tensor - (before[name] if name in before else torch.eye(len(tensor)))
        for name, tensor in network.state_dict().items()
    }


def test_a_random_change_moves_every_tensor_as_far_as_the_expert(
    base: nn.Module, expert: nn.Module
) -> None:
    before = copy.deepcopy(expert.state_dict())
    found = changes(randomly_changed(base, expert, seed=0, k=1), base)
    expected = changes(expert, base)
    assert list(found) == list(expected)
    for name, change in expected.items():
        assert float(found[name].norm()) == pytest.approx(float(change.norm()), rel=1e-3, abs=1e-9)
    moved = found[PROJECTION]
    assert float(moved.norm()) == pytest.approx(0.5)
    assert (moved != 0).all()  # noise, not the expert's own direction
    assert all(torch.equal(before[name], own) for name, own in expert.state_dict().items())


def test_its_noise_depends_on_seed_number_and_name_alone(
    base: nn.Module, expert: nn.Module
) -> None:
    first = changes(randomly_changed(base, expert, seed=0, k=1), base)
    name, *others = (name for name, change in first.items() if change.norm() > 0)
    again = copy.deepcopy(expert)
    again.state_dict()[name].mul_(1.1)
    after = changes(randomly_changed(base, again, seed=0, k=1), base)
    assert not torch.equal(after[name], first[name])
    assert all(torch.equal(after[other], first[other]) for other in others)
    for seed, k in ((0, 2), (1, 1)):
        other = changes(randomly_changed(base, expert, seed=seed, k=k), base)
        cosine = torch.cosine_similarity(other[name].flatten(), first[name].flatten(), dim=0)
        assert abs(float(cosine)) < 0.5


def test_projections_are_applied_whichever_network_has_them(
    base: nn.Module, expert: nn.Module
) -> None:
    x_t, t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
    changed = randomly_changed(expert, base, seed=0, k=1)  # the base has them, the expert has none
    moved = changed.state_dict()[PROJECTION] - expert.state_dict()[PROJECTION]
    assert float(moved.norm()) == pytest.approx(0.5)
    before, seen = predict(changed, x_t, t), []
    with listening(changed, sites(changed, "block"), lambda path, _: seen.append(path)):
        changed.state_dict()[PROJECTION].mul_(2)
        assert not torch.equal(predict(changed, x_t, t), before)
    assert seen == BLOCKS
