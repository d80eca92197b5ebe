"""Laws of the merge: what coefficients 0 and 1 give back, and how close Eq. 8 is met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deme_cli.artifacts import MergedRecord, fingerprint_file, load_tensors, read_record
from deme_cli.diffusion.projection import PREFIX
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import PROJECTION, open_experts, open_inputs
from deme_cli.merging.methods.linear import linear_terms
from deme_cli.merging.task_vectors import measure, write_task_vector

# unit roundoff of what is stored, and the largest absolute error of its smallest numbers
ROUNDOFF = {
    torch.float64: (2.0**-53, 0.0),
    torch.float32: (2.0**-24, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 0.0),
}
W = [0.1, -0.35, 1.7]


def merge_artifacts(
    base: Path, experts: list[Path], coefficients: list[float], output: Path
) -> MergedRecord:
    inputs = open_inputs(base, open_experts(experts, "expert", "task-vector"))
    return merge_inputs(inputs, coefficients, output)


def write_vectors(base: Path, experts: list[Path]) -> list[Path]:
    inputs = open_inputs(base, open_experts(experts, "expert"))
    paths = [path.with_name(path.name.replace("ft_", "tv_")) for path in experts]
    for index, norms in enumerate(measure(inputs)[0]):
        write_task_vector(inputs, index, norms, paths[index])
    return paths


def require_eq8(merged: Path, base: Path, experts: list[Path], *, as_vectors: bool) -> None:
    """Check `merged` against theta + sum_i w_i (theta_i - theta) in float64.

    The computed sum has M = N + 1 terms c_k x_k. Rounding c_k, the product and at most M - 1 sums
    leaves an error of at most (M + 1) u' sum_k |c_k x_k| to first order, u' of float32 (float64);
    storing adds u |result|. A stored vector was rounded itself: u |w_i tau_i| each. The factor 1.01
    covers the second order.
    """
    theta, thetas = load_tensors(base), [load_tensors(path) for path in experts]
    for name, result in load_tensors(merged).items():
        u, floor = ROUNDOFF[result.dtype]
        u_sum = 2.0**-53 if result.dtype == torch.float64 else 2.0**-24
        x_0 = theta[name].double()
        taus = [weights[name].double() - x_0 for weights in thetas]
        exact = x_0 + sum(w * tau for w, tau in zip(W, taus, strict=True))
        if as_vectors:
            terms = [x_0, *(w * tau for w, tau in zip(W, taus, strict=True))]
            stored = sum(abs(w) * (u * tau.abs() + floor) for w, tau in zip(W, taus, strict=True))
        else:
            terms = [(1 - sum(W)) * x_0]
            terms += [w * weights[name].double() for w, weights in zip(W, thetas, strict=True)]
            stored = torch.zeros_like(x_0)
        sizes = sum(term.abs() for term in terms)
        bound = 1.01 * ((len(W) + 2) * u_sum * sizes + u * exact.abs() + stored + floor)
        assert ((result.double() - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_a_merge_is_eq_8_within_rounding_and_vectors_give_the_same(
    write_inputs: Callable, weights: Callable, tmp_path: Path, dtype: torch.dtype
) -> None:
    theta = weights(0, dtype)
    thetas = [
        {name: (tensor.double() + 0.1 * weights(seed, dtype)[name].double()).to(dtype)
         for name, tensor in theta.items()}
        for seed in (1, 2, 3)
    ]  # fmt: skip
    base, experts = write_inputs(theta, thetas)
    vectors = write_vectors(base, experts)
    record = merge_artifacts(base, experts, W, tmp_path / "merged.safetensors")
    require_eq8(tmp_path / "merged.safetensors", base, experts, as_vectors=False)
    merge_artifacts(base, vectors, W, tmp_path / "from-vectors.safetensors")
    require_eq8(tmp_path / "from-vectors.safetensors", base, experts, as_vectors=True)
    assert record.fingerprint == fingerprint_file(tmp_path / "merged.safetensors")
    assert record.coefficients == W
    assert [expert["range"] for expert in record.parents] == [[0, 34], [34, 67], [67, 100]]
    assert record.base == read_record(base).fingerprint


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_coefficients_0_give_back_the_base_and_1_the_expert_bit_for_bit(
    write_inputs: Callable, weights: Callable, tmp_path: Path, dtype: torch.dtype
) -> None:
    extra = {"steps": torch.tensor([3, 4])}
    base, experts = write_inputs(
        {**weights(0, dtype), **extra}, [{**weights(seed, dtype), **extra} for seed in (1, 2, 3)]
    )
    output = tmp_path / "merged.safetensors"
    fingerprints = [read_record(path).fingerprint for path in (base, *experts)]
    assert merge_artifacts(base, experts, [0, 0, 0], output).fingerprint == fingerprints[0]
    assert merge_artifacts(base, experts, [0, 1, 0], output).fingerprint == fingerprints[2]
    assert merge_artifacts(base, experts[:1], [1], output).fingerprint == fingerprints[1]
    vectors = write_vectors(base, experts)
    assert merge_artifacts(base, vectors, [0, 0, 0], output).fingerprint == fingerprints[0]
    assert fingerprint_file(output) == fingerprints[0]


def test_tensors_longer_than_a_block_are_whole(write_inputs: Callable, tmp_path: Path) -> None:
    size = 1_300_001  # two blocks and a piece that ends in the middle
    theta, other = torch.randn(size), torch.randn(size)
    base, experts = write_inputs({"a": theta, "b": other}, [{"a": other, "b": theta}])
    inputs, written = open_inputs(base, open_experts(experts, "expert")), []
    merge_inputs(inputs, [0.25], tmp_path / "merged.safetensors", advance=written.append)
    merged = load_tensors(tmp_path / "merged.safetensors")
    torch.testing.assert_close(merged["a"], 0.75 * theta + 0.25 * other)
    torch.testing.assert_close(merged["b"], 0.75 * other + 0.25 * theta)
    assert written == sorted(written)
    assert written[-1] == 2 * 4 * size


def projected(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(6, 6, generator=generator)
    return {**weights, f"{PREFIX}.mid_block.weight": torch.eye(6) + noise}


def test_block_projections_merge_around_the_identity(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    assert f"{PREFIX}." == PROJECTION
    thetas = [projected(weights(seed), seed) for seed in (1, 2)]
    base, experts = write_inputs(weights(0), thetas, projection="block")
    output, name = tmp_path / "merged.safetensors", f"{PREFIX}.mid_block.weight"
    w = [0.3, 0.5]
    expected = torch.eye(6) + sum(
        c * (theta[name] - torch.eye(6)) for c, theta in zip(w, thetas, strict=True)
    )
    assert merge_artifacts(base, experts, w, output).projection == "block"
    torch.testing.assert_close(load_tensors(output)[name], expected)
    vectors = write_vectors(base, experts)
    torch.testing.assert_close(load_tensors(vectors[0])[name], thetas[0][name] - torch.eye(6))
    merge_artifacts(base, [vectors[0], experts[1]], w, output)
    torch.testing.assert_close(load_tensors(output)[name], expected)

    whole = merge_artifacts(base, experts[:1], [1], output)
    assert whole.fingerprint == read_record(experts[0]).fingerprint
    nothing = merge_artifacts(base, experts, [0, 0], output)
    assert nothing.fingerprint == read_record(base).fingerprint
    assert nothing.projection == "none"


def test_tensors_side_by_side_take_their_own_coefficients(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    """Neighbours with equal coefficients are one run, others are not; each is Eq. 8 by itself."""
    names = [f"layer.{index}.weight" for index in range(6)]
    thetas = [{name: torch.randn(5, 3) for name in names} for _ in range(3)]
    base, experts = write_inputs(thetas[0], thetas[1:])
    inputs = open_inputs(base, open_experts(experts, "expert"))
    finer = {"layer.[12].*": (1.0, 0.0), "layer.4.*": (0.0, 0.0), "layer.?.*": (-0.5, 0.25)}
    output = tmp_path / "merged.safetensors"
    record = merge_inputs(inputs, Coefficients((0.5, 0.5), finer), output)
    for name, merged in load_tensors(output).items():
        theta, *others = (weights[name] for weights in thetas)
        w = Coefficients((0.5, 0.5), finer).of(name)
        expected = theta + sum(c * (x - theta) for c, x in zip(w, others, strict=True))
        torch.testing.assert_close(merged, expected)
        if name[6] in "124":
            assert torch.equal(merged, theta if name[6] == "4" else others[0])
    assert (record.coefficients, record.method, record.settings) == ([0.5, 0.5], "linear", {})
    assert record.coefficients_for == {glob: list(w) for glob, w in finer.items()}
    with pytest.raises(ConfigError, match=r"'layers\.\*' matches no tensor"):
        merge_inputs(inputs, Coefficients((0.5, 0.5), {"layers.*": (1.0, 1.0)}), output)


def test_what_does_not_belong_together_is_named(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    output = tmp_path / "merged.safetensors"
    good, cut = weights(0), weights(1)
    lacking = {name: tensor for name, tensor in cut.items() if name != "conv.bias"}
    square, wide = f"{PREFIX}.a.weight", {f"{PREFIX}.a.weight": torch.zeros(2, 3)}
    cases = {
        "lacks 'conv.bias', which .*base": [lacking],
        "has 'extra', which .*base.* lacks": [{**cut, "extra": torch.zeros(1)}],
        r"'conv.bias' is F32 \[3\], .*base.* has F32 \[17\]": [
            {**cut, "conv.bias": torch.zeros(3)}
        ],
        "'scale' is I64": [{**cut, "scale": cut["scale"].long()}],
        "lacks 'chan.* the same --projection": [projected(cut, 1), cut],
        f"'{square}' has shape": [{**cut, **wide}],
        "has .*a.weight', which .* lacks": [projected(cut, 1), {**cut, square: torch.eye(2)}],
    }
    for number, (message, thetas) in enumerate(cases.items()):
        base, experts = write_inputs(good, thetas, folder=str(number))
        with pytest.raises(ArtifactError, match=message):
            merge_artifacts(base, experts, [0.5] * len(experts), output)
    other, strangers = write_inputs(weights(7), [weights(8)], folder="other")
    base, experts = write_inputs(good, [cut], folder="right")
    with pytest.raises(ArtifactError, match="merge experts of one base"):
        merge_artifacts(base, [*experts, *strangers], [0.5, 0.5], output)
    with pytest.raises(ArtifactError, match="kind 'expert' or 'task-vector', found 'base'"):
        merge_artifacts(base, [other], [1], output)
    with pytest.raises(ArtifactError, match="kind 'base', found 'expert'"):
        merge_artifacts(experts[0], experts, [1], output)
    with pytest.raises(ConfigError, match="are the same expert"):
        merge_artifacts(base, [*experts, *write_vectors(base, experts)], [1, 1], output)
    with pytest.raises(ConfigError, match="2 coefficients for 1 experts"):
        merge_artifacts(base, experts, [1, 2], output)
    with pytest.raises(ConfigError, match="expected finite numbers"):
        merge_artifacts(base, experts, [float("nan")], output)
    with pytest.raises(MissingError, match="no such file"):
        merge_artifacts(base, [tmp_path / "absent.safetensors"], [1], output)
    experts[0].write_bytes(experts[0].read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        merge_artifacts(base, experts, [1], output)
    assert not output.exists()


def test_integers_are_kept_and_never_averaged(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    output, count = tmp_path / "merged.safetensors", {"count": torch.tensor([1, 2])}
    flags = {"flags": torch.tensor([True, False])}
    base, experts = write_inputs(
        {**weights(0), **count, **flags}, [{**weights(1), **count, **flags}]
    )
    merge_artifacts(base, experts, [0.5], output)
    assert load_tensors(output)["count"].tolist() == [1, 2]
    vectors = write_vectors(base, experts)
    assert load_tensors(vectors[0])["count"].tolist() == [0, 0]
    merge_artifacts(base, vectors, [0.5], output)
    assert load_tensors(output)["flags"].tolist() == [True, False]
    output.unlink()

    changed = {**weights(1), "count": torch.tensor([1, 3]), **flags}
    base, experts = write_inputs({**weights(0), **count, **flags}, [changed])
    with pytest.raises(ArtifactError, match=r"'count' of integers \(I64\) differs"):
        merge_artifacts(base, experts, [0.5], output)
    with pytest.raises(ArtifactError, match="no average and no difference"):
        write_vectors(base, experts)
    assert not output.exists()


def test_numbers_that_fail_are_named_and_nothing_is_written(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    output = tmp_path / "merged.safetensors"
    broken = {**weights(1), "conv.bias": torch.full((17,), float("nan"))}
    base, experts = write_inputs(weights(0), [broken])
    with pytest.raises(NumericsError, match=r"'conv.bias' would not be finite"):
        merge_artifacts(base, experts, [0.5], output)
    half = weights(0, torch.float16)
    base, experts = write_inputs(half, [{**half, "scale": torch.tensor(60000.0).half()}])
    with pytest.raises(NumericsError, match="'scale' would not be finite in F16"):
        merge_artifacts(base, experts, [2.0], output)
    eighth = {"a": torch.zeros(4).to(torch.float8_e4m3fn)}
    base, experts = write_inputs(eighth, [eighth])
    with pytest.raises(ArtifactError, match="'a' of F8_E4M3 cannot be subtracted or merged"):
        merge_artifacts(base, experts, [0.5], output)
    assert [path.name for path in tmp_path.glob("*merged*")] == []


def test_what_is_left_for_the_base_by_rounding_alone_is_left_out() -> None:
    ten = SimpleNamespace(experts=[SimpleNamespace(is_vector=False)] * 10)
    assert sum([0.1] * 10) != 1
    assert linear_terms(ten, [0.1] * 10) == tuple((k, 0.1) for k in range(1, 11))
