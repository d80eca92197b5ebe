"""Candidate weights in memory: one network that is set to theta + sum_i w_i tau_i again and again.

Base and parents are held once in float32 on the device; a candidate is an in-place linear
combination (Eq. 8), so a trial costs a few passes over the weights and no allocation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deme_cli.artifacts import load_tensors
from deme_cli.diffusion.denoiser import Denoiser, Weights, assemble, choose_device
from deme_cli.merging.combine import linear_terms
from deme_cli.merging.lineage import Family


class CandidateNetwork:
    """A denoiser whose weights are those of the coefficients it was last given."""

    def __init__(self, family: Family, *, device: str, dtype: str) -> None:
        self._family = family
        place = choose_device(device)
        theta = load_tensors(family.base.path)
        for spec in family.projections:
            theta[spec.name] = torch.eye(spec.shape[0])
        where = str(family.base.path)
        self._denoiser = assemble(family.base_record, theta, where, device=device, dtype=dtype)
        self._sources = [_floats(theta, place)]
        for parent in family.parents:
            self._sources.append(_floats(load_tensors(parent.path), place))

    @torch.no_grad()
    def at(self, coefficients: Sequence[float]) -> Denoiser:
        """The denoiser theta + sum_i w_i tau_i; valid until the next call."""
        terms = linear_terms(self._family, coefficients)
        for name, parameter in self._denoiser.network.state_dict().items():
            if name in self._sources[0]:
                total = parameter if parameter.dtype == torch.float32 else parameter.float()
                total.zero_()
                for source, w in terms:
                    total.add_(self._sources[source][name], alpha=w)
                if total is not parameter:
                    parameter.copy_(total)
        return self._denoiser


def _floats(weights: Weights, device: torch.device) -> dict[str, Tensor]:
    """The floating-point tensors in float32 on `device`; a candidate keeps the base's integers."""
    return {
        name: tensor.to(device, torch.float32)
        for name, tensor in weights.items()
        if tensor.is_floating_point()
    }
