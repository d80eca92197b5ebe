"""From a point of the space to its objective: one network that takes each candidate's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.errors import ArtifactError
from deme_cli.merging.candidates import CandidateNetwork
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.known import LINEAR, MethodSettings
from deme_cli.merging.search.losses import HeldOutLoss
from deme_cli.merging.search.objectives import Objective
from deme_cli.merging.search.space import Point, Space
from deme_cli.merging.search.trials import BY_RANGE, SLOPES, SOUP_NAME
from deme_cli.sampling.ensemble import SamplingExpert, single
from deme_cli.timesteps import TimestepRange, require_cover
from deme_cli.training.held_out import Check

HELD_BYTES = 8 << 30  # float32 weights of base and parents: up to four experts of 400 M parameters


class Evaluator:
    """Objectives of candidates, by rung; `with_slopes`: rung 0 gives the gradient as well.

    Then, or where they are large, base and parents are read from their files again for each
    candidate, and memory holds one network (and one gradient) whatever N; else they stay in memory.
    """

    def __init__(
        self, family: Family, space: Space, *, method: MethodSettings, device: str, dtype: str,
        with_slopes: bool = False,
    ) -> None:  # fmt: skip
        self.family, self.space, self.with_slopes = family, space, with_slopes
        self._method, self._device, self._dtype = method, device, dtype
        self.objectives: Sequence[Objective] = ()
        self.check: Check = lambda *progress: None

    @property
    def _holds(self) -> bool:
        """Whether base and parents stay in memory: not for slopes, nor beyond HELD_BYTES. A rule of
        sizes alone, so that a search goes on elsewhere as it began."""
        num_bytes = 4 * (len(self.family.parents) + 1) * self.family.base.num_parameters
        return not self.with_slopes and num_bytes <= HELD_BYTES

    def open(self) -> None:
        """Load the network now."""
        _ = self.network

    @cached_property
    def network(self) -> CandidateNetwork:
        """Loaded when the first candidate comes."""
        return self._open(self._method)

    def _open(self, method: MethodSettings) -> CandidateNetwork:
        return CandidateNetwork(
            self.family, method=method, hold=self._holds, device=self._device, dtype=self._dtype
        )

    def __call__(self, rung: int, point: Point, name: str = "") -> tuple[float, dict[str, Any]]:
        """The objective of a rung at `point`, where the reference `name` lies, if any; and what
        else came with it."""
        objective = self.objectives[rung]
        denoiser = self.network.at(self.space.coefficients(point))
        if rung == 0 and self.with_slopes and name != SOUP_NAME:
            assert isinstance(objective, HeldOutLoss)
            value = objective.value_and_gradient(denoiser, self.check)
            if not math.isfinite(value):
                return value, {}
            return value, {SLOPES: self.space.slopes(self.network.slopes())}
        if isinstance(objective, HeldOutLoss):
            errors = objective.errors(single(denoiser), self.check)
            by_range = objective.by_range(errors, self.ranges)
            return errors.mean().item(), {BY_RANGE: by_range}
        return objective(single(denoiser), self.check, self._key(point)), {}

    def _key(self, point: Point) -> str:
        """Everything that makes the candidate's weights: what is kept under it may outlive a search
        that was given up, and the next one has other experts."""
        parents = [parent.record.fingerprint for parent in self.family.parents]
        space, method = self.space, [self._method.name, self._method.used]
        return json.dumps(
            [self.family.base_record.fingerprint, parents, method, self._dtype,
             space.all_groups, dict(space.fixed), point]
        )  # fmt: skip

    @property
    def ranges(self) -> list[TimestepRange]:
        """Those of the experts, from low timesteps to high."""
        return sorted({parent.record.timesteps for parent in self.family.parents})

    @cached_property
    def _plain(self) -> CandidateNetwork:
        """The network of linear combinations, whatever the method."""
        if self._method.name == "linear":
            return self.network
        return self._open(LINEAR)

    def linear(self, coefficients: Sequence[float]) -> list[SamplingExpert]:
        """theta + sum_i w_i tau_i with the same N coefficients everywhere; valid until the next."""
        return single(self._plain.at(coefficients))

    def denoiser(self, coefficients: Coefficients | None) -> list[SamplingExpert]:
        """The method's network for these coefficients, None for those it finds itself or 1/N."""
        return single(self.network.at(coefficients))

    def model(self, point: Point) -> list[SamplingExpert]:
        """The candidate at `point`; valid until the next one is asked for."""
        return single(self.network.at(self.space.coefficients(point)))

    def ensemble(self) -> list[SamplingExpert]:
        """The experts, each in its range, taking turns in the one network (Eq. 7).

        Of several experts of one range the first counts. Raises ArtifactError where they do not
        cover [0, T) once.
        """
        ranges = first_of_each_range(self.family)
        return [
            SamplingExpert(
                self.family.parents[index].record.timesteps, partial(self._expert, index)
            )
            for index in ranges
        ]

    def _expert(self, index: int) -> Denoiser:
        return self._plain.at([float(i == index) for i in range(self.space.num_experts)])


def first_of_each_range(family: Family) -> list[int]:
    """Numbers of the parents that make the ensemble, in the order of their ranges.

    Raises ArtifactError where these do not cover [0, T) once.
    """
    found: dict[TimestepRange, int] = {}
    for index in family.by_range:
        found.setdefault(family.parents[index].record.timesteps, index)
    require_cover(list(found), family.base_record.num_train_timesteps)
    return list(found.values())


def has_ensemble(family: Family) -> bool:
    """Whether the parents cover [0, T) once."""
    try:
        first_of_each_range(family)
    except ArtifactError:
        return False
    return True
