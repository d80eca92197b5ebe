from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import load_tensors, read_record
from deme_cli.diffusion.projection import PREFIX
from deme_cli.errors import ArtifactError, MissingError, NumericsError
from deme_cli.merging.inputs import find_base, open_experts, open_inputs
from deme_cli.merging.task_vectors import block_of, measure, write_task_vector
from deme_cli.run_file import read_run_file

NAMES = {
    "conv_in.weight": "other",
    "time_embedding.linear_1.bias": "other",
    "down_blocks.0.resnets.0.conv1.weight": "down_blocks.0",
    "down_blocks.11.attentions.0.to_q.weight": "down_blocks.11",
    "mid_block.resnets.0.norm1.weight": "mid_block",
    "up_blocks.1.resnets.2.conv2.bias": "up_blocks.1",
    "transformer_blocks.3.attn.to_q.weight": "transformer_blocks.3",
    "single_transformer_blocks.10.norm.linear.bias": "single_transformer_blocks.10",
}
PROJECTION = f"{PREFIX}.mid_block.weight"


def network(seed: int, *, projected: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(9, 4, generator=generator) for name in NAMES}
    if projected:
        weights[PROJECTION] = torch.eye(5) + torch.randn(5, 5, generator=generator)
    return weights


def test_norms_and_cosines_are_those_of_the_flattened_differences(write_inputs: Callable) -> None:
    theta = network(0, projected=False)
    thetas = [network(seed, projected=True) for seed in (1, 2, 3)]
    base, experts = write_inputs(theta, thetas, projection="block")
    norms_of, cosines = measure(open_inputs(base, open_experts(experts, "expert")))

    identity = {**theta, PROJECTION: torch.eye(5)}
    taus = [{n: (w[n].double() - identity[n].double()).flatten() for n in w} for w in thetas]
    flat = [torch.cat([tau[name] for name in sorted(tau)]) for tau in taus]
    size = torch.cat([tensor.double().flatten() for tensor in theta.values()]).norm()
    for index, tau in enumerate(taus):
        norms = norms_of[index]
        assert norms["total"] == pytest.approx(flat[index].norm().item(), rel=1e-12)
        assert norms["relative"] == pytest.approx((flat[index].norm() / size).item(), rel=1e-12)
        blocks = {*NAMES.values(), "channel_projection"}
        assert set(norms) == {"total", "relative", *blocks}
        for block in blocks:
            own = torch.cat([tau[name] for name in tau if block_of(name) == block])
            assert norms[block] == pytest.approx(own.norm().item(), rel=1e-12)
        for other, vector in enumerate(flat):
            cosine = torch.nn.functional.cosine_similarity(flat[index], vector, dim=0).item()
            assert cosines[index][other] == pytest.approx(cosine, abs=1e-12)
    base, experts = write_inputs(theta, [theta, network(1, projected=False)], folder="still")
    norms_of, cosines = measure(open_inputs(base, open_experts(experts, "expert")))
    assert (norms_of[0]["total"], cosines) == (0, [[None, None], [None, pytest.approx(1)]])


def test_a_task_vector_is_the_difference_with_the_record_of_its_expert(
    write_inputs: Callable, tmp_path: Path
) -> None:
    theta, other = network(0, projected=False), network(1, projected=False)
    base, experts = write_inputs(theta, [other])
    inputs = open_inputs(base, open_experts(experts, "expert"))
    norms = measure(inputs)[0][0]
    record = write_task_vector(inputs, 0, norms, tmp_path / "tv.safetensors")
    stored = load_tensors(tmp_path / "tv.safetensors")
    assert all(torch.equal(stored[name], other[name] - theta[name]) for name in theta)
    expert = read_record(experts[0])
    assert record == read_record(tmp_path / "tv.safetensors", "task-vector")
    assert (record.expert, record.base) == (expert.fingerprint, expert.base)
    assert (record.range, record.norms) == (expert.range, norms)


def test_weights_that_are_not_finite_are_named(write_inputs: Callable) -> None:
    theta, broken = network(0, projected=False), network(1, projected=False)
    broken["conv_in.weight"][3] = math.inf
    base, experts = write_inputs(theta, [broken])
    with pytest.raises(NumericsError, match=r"ft_1of1.*not finite"):
        measure(open_inputs(base, open_experts(experts, "expert")))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    base, experts = write_inputs(zeros, [theta])
    with pytest.raises(NumericsError, match="all zero"):
        measure(open_inputs(base, open_experts(experts, "expert")))


def test_the_base_is_the_one_named_the_runs_own_or_one_beside_the_experts(
    write_inputs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = network(0, projected=False)
    base, experts = write_inputs(theta, [network(1, projected=False)], folder="run")
    stranger, _ = write_inputs(network(5, projected=False), [theta], folder="other")
    experts = open_experts(experts, "expert")
    monkeypatch.chdir(tmp_path)
    run = read_run_file(None)
    assert find_base(experts, run, base) == base
    assert find_base(experts, run, None) == base
    with pytest.raises(ArtifactError, match="was finetuned from base"):
        find_base(experts, run, stranger)
    with pytest.raises(MissingError, match=r"no such file.*--base"):
        find_base(experts, run, tmp_path / "absent.safetensors")

    renamed = base.rename(base.with_name("my-base.safetensors"))
    assert find_base(experts, run, None) == renamed
    renamed.unlink()
    with pytest.raises(MissingError, match="or name it with --base"):
        find_base(experts, run, None)
    (tmp_path / "deme.toml").write_text('[model]\nbase = "other/base.safetensors"\n')
    with pytest.raises(ArtifactError, match="or name it with --base"):
        find_base(experts, read_run_file(None), None)
