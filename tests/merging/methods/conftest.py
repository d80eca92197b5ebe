"""Families for merging methods: in all dtypes, with integers and a block projection; networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deme_cli.artifacts import MergedRecord, load_tensors
from deme_cli.diffusion.projection import PREFIX
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import Inputs, open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings

PROJECTION = f"{PREFIX}.mid_block.weight"
ROUNDOFF = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Known:
    """A inputs in files and in memory; `theta` has the identity where the experts project."""

    inputs: Inputs
    theta: dict[str, Tensor]
    thetas: list[dict[str, Tensor]]
    output: Path

    @property
    def names(self) -> list[str]:
        return [name for name, tensor in self.theta.items() if tensor.is_floating_point()]

    def merge(
        self, coefficients: object, method: MethodSettings
    ) -> tuple[MergedRecord, dict[str, Tensor]]:
        record = merge_inputs(self.inputs, coefficients, self.output, method=method)
        return record, load_tensors(self.output)

    def require_close(self, found: dict[str, Tensor], expected: dict[str, Sequence[float]]) -> None:
        """Check every tensor against the flat list of its expected elements."""
        assert torch.equal(found["count"], self.theta["count"])
        for name in self.names:
            tolerance = ROUNDOFF[self.theta[name].dtype]
            torch.testing.assert_close(
                found[name].double().flatten(), torch.tensor(expected[name], dtype=torch.float64),
                rtol=4 * tolerance, atol=4 * tolerance,
            )  # fmt: skip


MakeFamily = Callable[..., Known]


@pytest.fixture
def make_family(write_inputs: Callable, weights: Callable, tmp_path: Path) -> MakeFamily:
    """A base and `count` experts that moved by `scale`, partly together; some elements not."""

    def make(count: int = 3, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> Known:
        theta = weights(0, dtype)
        thetas = []
        for seed in range(1, count + 1):
            shared, own = weights(99, torch.float64), weights(seed, torch.float64)
            moved = {name: shared[name] + own[name] for name in own}
            moved["conv.bias"][:5] = 0
            thetas.append(
                {name: (tensor.double() + scale * moved[name]).to(dtype)
                 for name, tensor in theta.items()}
            )  # fmt: skip
            generator = torch.Generator().manual_seed(50 + seed)
            noise = scale * (1 + torch.randn(4, 4, generator=generator))
            thetas[-1][PROJECTION] = (torch.eye(4) + noise).to(dtype)
        whole = {"count": torch.tensor([3, 4])}
        base, experts = write_inputs(
            {**theta, **whole}, [{**t, **whole} for t in thetas], projection="block"
        )
        inputs = open_inputs(base, open_experts(experts, "expert"))
        theta = {**theta, **whole, PROJECTION: torch.eye(4, dtype=dtype)}
        return Known(inputs, theta, thetas, tmp_path / "merged.safetensors")

    return make


def differences(known: Known) -> list[dict[str, list[float]]]:
    """tau_i by name as flat lists, subtracted in float32 (float64 in float64)."""
    taus = []
    for weights in known.thetas:
        tau = {}
        for name in known.names:
            wide = torch.float64 if known.theta[name].dtype == torch.float64 else torch.float32
            tau[name] = (weights[name].to(wide) - known.theta[name].to(wide)).flatten().tolist()
        taus.append(tau)
    return taus


@pytest.fixture
def taus_of() -> Callable[[Known], list[dict[str, list[float]]]]:
    return differences


def stored_vectors(known: Known) -> Known:
    """The same inputs with task vectors in place of its experts."""
    from deme_cli.merging.task_vectors import measure, write_task_vector

    paths = []
    for index, norms in enumerate(measure(known.inputs)[0]):
        paths.append(known.output.with_name(f"tv_{index + 1}.safetensors"))
        write_task_vector(known.inputs, index, norms, paths[-1])
    inputs = open_inputs(known.inputs.base.path, open_experts(paths, "task-vector"))
    return Known(inputs, known.theta, known.thetas, known.output)


@pytest.fixture
def as_vectors() -> Callable[[Known], Known]:
    return stored_vectors
