"""What merges from data share: laws that hold for either method, their draws, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from deme_cli.artifacts import load_tensors, write_artifact
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.merging.lineage import Family, open_family, open_parents
from deme_cli.merging.methods.data_driven import MergedWeights, mean_weights
from deme_cli.merging.methods.fisher import merge_fisher
from deme_cli.merging.methods.range_draws import RangeDraws
from deme_cli.merging.methods.regmean import merge_regmean
from deme_cli.timesteps import TimestepRange

EITHER = pytest.mark.parametrize("merge", [merge_regmean, merge_fisher])


@EITHER
def test_equal_experts_give_the_expert(merge: Callable, family: Family, draws: RangeDraws) -> None:
    first, second = family.parents
    weights = load_tensors(first.path)
    write_artifact(second.path, weights, replace(first.record, range=[50, 100], index=2))
    again = open_family(family.base.path, open_parents([first.path, second.path], "expert"))
    *_, merged = merge(again, draws)
    for name, tensor in weights.items():
        assert torch.equal(merged.weights[name], tensor), name


@EITHER
@pytest.mark.parametrize("kept", [0, 1])
def test_an_expert_of_coefficient_0_does_not_count(
    merge: Callable, family: Family, draws: RangeDraws, kept: int
) -> None:
    *_, merged = merge(family, draws, coefficients=[2.0 * (i == kept) for i in range(2)])
    for name, tensor in load_tensors(family.parents[kept].path).items():
        torch.testing.assert_close(merged.weights[name], tensor)


@EITHER
def test_progress_counts_the_images_forwarded_and_a_check_can_stop(
    merge: Callable, family: Family, draws: RangeDraws
) -> None:
    *steps, last = merge(family, draws)
    assert [(step.done, step.total) for step in steps] == [(4, 12), (6, 12), (10, 12), (12, 12)]
    assert isinstance(last, MergedWeights)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(merge(family, draws, check=stop))


@pytest.mark.parametrize(
    ("merge", "factor", "words"),
    [
        (merge_regmean, torch.nan, "'conv_in\\.weight' is not finite"),
        (merge_fisher, torch.nan, "'conv_in\\.weight' is not finite"),
        (merge_regmean, 1e37, "the inputs of"),
        (merge_fisher, 1e37, "gradients"),
    ],
)
def test_an_expert_that_is_not_finite_or_computes_what_is_not_is_named(
    merge: Callable, family: Family, draws: RangeDraws, factor: float, words: str
) -> None:
    parent = family.parents[1]
    weights = load_tensors(parent.path)
    weights["conv_in.weight"] *= factor
    write_artifact(parent.path, weights, parent.record)
    with pytest.raises(NumericsError, match=rf"ft_2of2\.safetensors: {words}"):
        list(merge(family, draws))


@EITHER
@pytest.mark.parametrize("coefficients", [[1], [1, -1], [0, 0], [1, float("nan")]])
def test_coefficients_that_cannot_weigh_are_refused(
    merge: Callable, family: Family, draws: RangeDraws, coefficients: list[float]
) -> None:
    with pytest.raises(ConfigError, match="coefficients"):
        next(merge(family, draws, coefficients=coefficients))


def test_integers_are_the_base_s_or_an_error(write_family: Callable) -> None:
    base = {"weight": torch.ones(3), "count": torch.tensor([1, 2])}
    same = write_family(base, [{**base, "weight": torch.zeros(3)}, base], folder="same")
    mean = mean_weights(open_family(same[0], open_parents(same[1], "expert")), [0.5, 0.5])
    assert torch.equal(mean["count"], base["count"])
    assert (mean["weight"] == 0.5).all()
    other = {**base, "count": torch.tensor([1, 3])}
    changed = write_family(base, [base, other], folder="changed")
    family = open_family(changed[0], open_parents(changed[1], "expert"))
    with pytest.raises(ArtifactError, match=r"ft_2of2\.safetensors: 'count' of integers"):
        mean_weights(family, [0.5, 0.5])


def test_draws_lie_in_their_range_evenly_and_more_of_them_only_add(draws: RangeDraws) -> None:
    few, many, span = replace(draws, num=20), replace(draws, num=1500), TimestepRange(25, 75)
    assert torch.equal(few.timesteps(span), many.timesteps(span)[:20])
    assert torch.equal(few.images(), many.images()[:20])
    counts = torch.bincount(many.timesteps(span), minlength=75)
    assert counts[:25].sum() == 0
    assert counts[25:].min() >= 28
    assert counts[25:].max() <= 32
    uses = torch.bincount(many.images(), minlength=len(draws.examples))
    assert set(uses.tolist()) == {1, 2}
