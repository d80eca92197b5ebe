"""RegMean: the layer whose outputs are nearest to each expert's, on that expert's own inputs.

Of a layer with weights W_i in expert i and the inputs X_i that expert i sees at its own timesteps,
W_M = argmin_W sum_i ||X_i W - X_i W_i||^2 = (sum_i G_i)^-1 sum_i G_i W_i, G_i = X_i^T X_i  (Jin et
al. 2023, Eq. 1-2), with the off-diagonals of every G_i times alpha (section 4; 0.9 as published).
A convolution is a linear layer of its patches. Biases, norms, embeddings, block projections and
grouped convolutions are averaged, as in the paper.

Computed from the average W_A of the experts: W_M = W_A + (sum_i G_i)^-1 sum_i G_i (W_i - W_A). So
weights of inputs that are always 0 keep the average, and G_i itself is never stored.
d inputs of a layer (C_in, times the kernel's pixels for a convolution), o outputs, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from deme_cli.diffusion.denoiser import build_network, choose_device, predict
from deme_cli.errors import NumericsError
from deme_cli.merging.lineage import Family, Parent
from deme_cli.merging.methods.data_driven import (
    DataProgress,
    MergedWeights,
    expert_network,
    expert_weights,
    in_float,
    mean_weights,
    round_like_experts,
    shares,
)
from deme_cli.merging.methods.range_draws import RangeDraws
from deme_cli.timesteps import TimestepRange
from deme_cli.training.held_out import Check

LARGEST_ALPHA = 1 - 1e-5  # keeps sums invertible, above the rounding of inputs in float32
_PATCHES = 1 << 26  # elements of unfolded inputs at a time: 256 MiB of float32


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer by the path of its module: d inputs, o outputs."""

    path: str
    num_inputs: int
    num_outputs: int

    @property
    def num_bytes(self) -> int:
        """What its sums take, in float64."""
        return 8 * self.num_inputs * (self.num_inputs + self.num_outputs)


def merge_regmean(
    family: Family,
    draws: RangeDraws,
    *,
    alpha: float = 0.9,
    coefficients: Sequence[float] | None = None,
    memory_bytes: int = 4 << 30,
    device: str = "cpu",
    dtype: str = "fp32",
    check: Check = lambda: None,
) -> Iterator[DataProgress | MergedWeights]:
    """Merge by RegMean; yields progress, then the weights.

    `coefficients` weigh the G_i and the average; as published they are equal.
    Sums are kept for as many layers at a time as fit into `memory_bytes` (at least one, and to
    solve a layer takes its sums once more). Each such group costs one pass of the draws through
    every expert: at 4 GiB one for DDPM's CIFAR-10 network, 20 for Stable Diffusion 1.5 (59 GiB).
    Raises NumericsError naming an expert that is not finite or computes what is not.
    """
    weigh = shares(family, coefficients)
    mean = mean_weights(family, weigh)
    groups = group_layers(regressed_layers(family), memory_bytes)
    done, total = 0, len(groups) * len(family.parents) * draws.num
    merged = dict(mean)
    for group in groups:
        sums = {layer.path: LayerSums(layer, alpha, sums_device(device)) for layer in group}
        for share, parent in zip(weigh, family.parents, strict=True):
            theta = expert_weights(family, parent)
            for path, one in sums.items():
                one.begin(share, theta[f"{path}.weight"], mean[f"{path}.weight"])
            network = expert_network(parent, theta, device=device, dtype=dtype)
            for num in _listen(network, sums, draws, parent.record.timesteps):
                check()
                done += num
                yield DataProgress(done, total)
            _require_finite(parent, sums)
            del network, theta
        for layer in group:
            average = mean[f"{layer.path}.weight"]
            correction = sums.pop(layer.path).solve()
            merged[f"{layer.path}.weight"] = average + correction.T.reshape(average.shape)
    details = {"layers": sum(map(len, groups)), "passes": len(groups)}
    yield MergedWeights(round_like_experts(family, merged), details)


def regressed_layers(family: Family) -> list[Layer]:
    """The layers of the family's network that are linear in their inputs, in its order."""
    with torch.device("meta"):
        network = build_network(family.base_record.model_config, str(family.base.path))
    return [
        Layer(path, module.weight[0].numel(), len(module.weight))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _unfolds(module))
    ]


def _unfolds(module: nn.Conv2d) -> bool:
    """Whether its outputs are one linear map of the patches that `unfold` gives."""
    return (
        module.groups == 1 and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    )


def group_layers(layers: Sequence[Layer], memory_bytes: int) -> list[list[Layer]]:
    """Consecutive layers whose sums fit into `memory_bytes` together; a larger one stands alone."""
    groups: list[list[Layer]] = []
    free = -1
    for layer in layers:
        if layer.num_bytes > free:
            groups.append([])
            free = memory_bytes
        groups[-1].append(layer)
        free -= layer.num_bytes
    return groups


def sums_device(name: str) -> torch.device:
    """Where sums in float64 are kept: on the network's device, on the CPU where it has none."""
    device = choose_device(name)
    return torch.device("cpu") if device.type == "mps" else device


class LayerSums:
    """sum_i s_i G_i (d, d) and sum_i s_i G'_i (W_i - W_A) (d, o) of one layer, in float64.

    G' is G with its off-diagonals times alpha, which bounds its eigenvalues from below by 1 - alpha
    of an input's energy. So products of a batch can be in float32, unless alpha is nearly 1.
    """

    def __init__(self, layer: Layer, alpha: float, device: torch.device) -> None:
        self._alpha = min(alpha, LARGEST_ALPHA)
        self._products_in = torch.float32 if alpha <= 0.99 else torch.float64
        d, o = layer.num_inputs, layer.num_outputs
        self._gram = torch.zeros(d, d, dtype=torch.float64, device=device)
        self._moment = torch.zeros(d, o, dtype=torch.float64, device=device)

    def begin(self, share: float, weight: Tensor, average: Tensor) -> None:
        """Take rows of the expert with `weight` (o, ...) and share s_i from now on."""
        delta = (in_float(weight) - average).flatten(1).T  # (d, o)
        self._share, self._delta = share, delta.to(self._gram.device, self._products_in)

    def add(self, rows: Tensor) -> None:
        """Add inputs (n, d) of the expert."""
        rows = rows.to(self._gram.device, self._products_in)
        alpha, delta = self._alpha, self._delta
        moment = alpha * (rows.T @ (rows @ delta))
        moment += (1 - alpha) * rows.square().sum(0)[:, None] * delta
        self._gram.add_(rows.T @ rows, alpha=self._share)
        self._moment.add_(moment, alpha=self._share)

    @property
    def is_finite(self) -> bool:
        """Whether all inputs were."""
        return bool(self._gram.diagonal().isfinite().all())

    def solve(self) -> Tensor:
        """(sum_i s_i G'_i)^-1 sum_i s_i G'_i (W_i - W_A) on the CPU, float32  (d, o); used up.

        0 for inputs that are always 0. Where inputs depend on each other, weights that no output
        shows are averaged by the energy of their inputs, which is the limit of alpha to 1.
        """
        gram, energy = self._gram, self._gram.diagonal().clone()
        gram.mul_(self._alpha).diagonal().copy_(torch.where(energy > 0, energy, 1.0))
        solution = torch.cholesky_solve(self._moment, torch.linalg.cholesky(gram))
        return solution.float().cpu()


def input_rows(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """The inputs of a layer as rows (n, d) in the order of its weights, some at a time.

    Of a convolution, one row per output pixel: the patch it sees, padding included.
    """
    if isinstance(module, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    assert isinstance(module, nn.Conv2d)
    assert isinstance(module.padding, tuple)  # as `_unfolds` asks
    per_image = module.weight[0, 0].numel() * inputs[0].numel()
    for part in inputs.split(max(1, _PATCHES // per_image)):
        patches = functional.unfold(
            part, module.kernel_size, module.dilation, module.padding, module.stride
        )
        yield patches.transpose(1, 2).reshape(-1, patches.shape[1])


@torch.no_grad()
def _listen(
    network: nn.Module, sums: Mapping[str, LayerSums], draws: RangeDraws, span: TimestepRange
) -> Iterator[int]:
    """Add to `sums` what their layers see of the draws in `span`; yields images forwarded."""

    def hear(path: str) -> Callable[[nn.Module, tuple], None]:
        def add(module: nn.Module, inputs: tuple) -> None:
            for rows in input_rows(module, inputs[0]):
                sums[path].add(rows)

        return add

    for path in sums:
        network.get_submodule(path).register_forward_pre_hook(hear(path))
    for batch in draws.batches(span, network):
        predict(network, batch.x_t, batch.times, batch.conditions)
        yield len(batch)


def _require_finite(parent: Parent, sums: Mapping[str, LayerSums]) -> None:
    for path, one in sums.items():
        if not one.is_finite:
            raise NumericsError(
                f"{parent.path}: the inputs of {path!r} are not finite; try --dtype fp32"
            )
