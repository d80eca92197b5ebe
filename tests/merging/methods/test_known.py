"""What methods ask for, said in one line each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.methods import METHODS, MethodSettings, fit_coefficients


def test_settings_that_there_are_not_are_refused() -> None:
    for settings, message in (
        ({"name": "tiess"}, "method 'tiess': expected one of linear, ties"),
        ({"name": "ties", "density": 0.0}, "density = 0.0: expected a share"),
        ({"name": "dare", "density": 1.5}, "density = 1.5: expected a share"),
        ({"name": "dare", "density": float("nan")}, "density = nan"),
        ({"name": "ties", "trim": "layer"}, "trim 'layer': expected one of model, tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            MethodSettings(**settings)
    assert MethodSettings("ties").used == {"density": 0.5, "trim": "model"}
    assert MethodSettings("dare", seed=3).used == {"density": 0.5, "seed": 3}
    assert MethodSettings("slerp").used == {}


def test_coefficients_that_do_not_fit_are_refused(make_family: Callable) -> None:
    two, three = make_family(2).inputs, make_family(3).inputs
    slerp, stock = MethodSettings("slerp"), MethodSettings("model-stock")
    for inputs, coefficients, settings, message in (
        (three, None, slerp, "slerp merges 2 experts, found 3"),
        (two, [0.5, 0.6], slerp, "expected w_1 \\+ w_2 = 1, found 1.1"),
        (two, Coefficients((0.5, 0.5), {"conv.*": (1.0, 1.0)}), slerp, "w_1 \\+ w_2 = 1"),
        (two, [0.5, 0.5], stock, "finds the coefficients itself"),
        (make_family(1).inputs, None, stock, "give 2 or more"),
        (two, [0.5], MethodSettings(), "1 coefficients for 2 experts"),
        (two, [0.5, float("inf")], MethodSettings("ties"), "expected finite numbers"),
        (two, Coefficients((0, 0), {"conf.*": (1, 1)}), MethodSettings(), "'conf.*' matches no"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_coefficients(inputs, coefficients, settings)
    assert fit_coefficients(two, None).values == (0.5, 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_integers_of_every_method_are_the_bases_and_checked(
    write_inputs: Callable, make_family: Callable, name: str
) -> None:
    from deme_cli.merging.combine import merge_inputs
    from deme_cli.merging.inputs import open_experts, open_inputs

    known = make_family(2)
    base = {n: known.theta[n] for n in known.inputs.base.tensors}
    experts = [{**weights, "count": known.theta["count"] + 1} for weights in known.thetas]
    base_path, paths = write_inputs(base, experts, projection="block")
    inputs = open_inputs(base_path, open_experts(paths, "expert"))
    with pytest.raises(ArtifactError, match="'count' of integers"):
        merge_inputs(inputs, None, known.output, method=MethodSettings(name))
    assert not known.output.exists()


@pytest.mark.parametrize("name", ["linear", "ties", "dare", "slerp"])
def test_coefficients_by_glob_are_those_merged_tensor_by_tensor(
    make_family: Callable, name: str
) -> None:
    known, method = make_family(2), MethodSettings(name, density=0.6)
    by_glob = {"conv.weight": (0.9, 0.1), "conv.*": (0.25, 0.75), "channel_*": (0.0, 1.0)}
    record, found = known.merge(Coefficients((0.5, 0.5), by_glob), method)
    for tensor in known.names:
        w = {"conv.weight": (0.9, 0.1), "conv.bias": (0.25, 0.75)}.get(tensor, (0.5, 0.5))
        w = (0.0, 1.0) if tensor.startswith("channel_") else w
        alone = known.merge(w, method)[1][tensor]
        assert (found[tensor] == alone).all(), tensor
    assert record.coefficients == [0.5, 0.5]
    assert record.coefficients_for == {glob: list(values) for glob, values in by_glob.items()}
